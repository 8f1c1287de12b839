"""Tables of what training.py has measured on a GPU.

    python benchmarks/gpu_table.py FILE.json     prints all of them
    python benchmarks/gpu_table.py               writes them into the pages that ask for some

A page asks between two comments, by a file of results/ and names of tables:

    <!-- gpu_table.py gpu-2026-11-28.json: speed jobs -->
    <!-- end -->
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md"]
ASKED = re.compile(r"(<!-- gpu_table\.py (\S+): ([a-z ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# An example; `doctor` and TRAIN_PRICE_PER_HOUR have yours.
DOLLARS_PER_HOUR = 3.0
PRICE = f"at ${DOLLARS_PER_HOUR:.0f} an hour"
DEFAULT_JOB_STEPS = 38
NONE = "–"  # noqa: RUF001
# RECIPE=gpt2-124M: 19,072 steps.
TEN_BILLION = 19_072 * 524_288


def speed(results: dict[str, Any]) -> Iterator[list[str]]:
    """Steady speed, and 10B tokens by arithmetic."""
    yield [
        results["machine"]["device"], "tokens/s", "ms a step", "times the original",
        "10B tokens", PRICE,
    ]  # fmt: skip
    original = results["speed"].get("original script", {}).get("tokens_per_second")
    for name, row in (results["speed"] | results.get("determinism", {})).items():
        rate = row["tokens_per_second"]
        hours = TEN_BILLION / rate / 3600
        yield [
            name, f"{rate / 1000:,.0f}k", f"{row['step_ms']:,.0f}",
            f"{rate / original:.2f}" if original else NONE,
            f"{hours:.1f} h", dollars(hours),
        ]  # fmt: skip


def overview(results: dict[str, Any]) -> Iterator[list[str]]:
    """Cost and gain of what the program does today, without prototypes: for the README."""
    yield [
        f"{results['machine']['device']}, {PRICE}",
        "tokens/s",
        "20M tokens",
        "held-out loss",
        "10B tokens",
    ]
    for name, row in results["speed"].items():
        if "prototype" in name:
            continue
        seconds = row.get("process_seconds")
        job = f"{seconds} s, {dollars(seconds / 3600)}" if seconds else NONE
        hours = TEN_BILLION / row["tokens_per_second"] / 3600
        yield [
            name, f"{row['tokens_per_second'] / 1000:,.0f}k",
            job, number(row.get("held_out_loss"), ".2f"), f"{hours:.1f} h, {dollars(hours)}",
        ]  # fmt: skip


def jobs(results: dict[str, Any]) -> Iterator[list[str]]:
    """From the start of the process; the whole job is the default one's 38 steps."""
    yield [
        "seconds from the process's start", "first line", "end of step 0",
        f"whole job, {DEFAULT_JOB_STEPS} steps", PRICE,
        "held-out loss",
    ]  # fmt: skip
    of_parts = [results["speed"], results.get("jobs", {}), results.get("determinism", {})]
    for part in of_parts:
        for name, row in part.items():
            is_whole = row.get("steps") == DEFAULT_JOB_STEPS
            whole = row.get("process_seconds") if is_whole else None
            loss = row.get("held_out_loss") if is_whole else None
            times = [row.get("first_line_seconds"), row.get("end_of_step_0_seconds")]
            if {whole, loss, *times} == {None}:
                continue
            yield [
                name, *(number(value, ".1f") for value in times), number(whole, ".0f"),
                dollars(whole and whole / 3600),
                number(loss, ".3f"),
            ]  # fmt: skip


def recipes(results: dict[str, Any]) -> Iterator[list[str]]:
    """The recipes of GPT-2's quality, shortened."""
    yield [results["machine"]["device"], "tokens/s", "held-out loss"]
    for name, row in results["recipes"].items():
        rate = row["tokens_per_second"]
        yield [name, f"{rate / 1000:,.0f}k", number(row.get("held_out_loss"), ".3f")]


def profile(results: dict[str, Any]) -> Iterator[list[str]]:
    """Kernels of a step by class."""
    found = results["profile"]
    yield [f"{results['machine']['device']}: class of kernel", "ms", "of the step"]
    step = found["step_ms"]
    idle = found["idle_share_of_step"] * step
    for name, ms in [*found["ms"].items(), ("idle", idle), ("the step", step)]:
        yield [name, f"{ms:,.0f}", f"{ms / step:.1%}"]


def longest(results: dict[str, Any]) -> Iterator[list[str]]:
    """The longest kernels."""
    yield ["kernel", "ms a step", "calls"]
    for kernel in results["profile"]["longest"]["passes"][:16]:
        yield [f"`{kernel['kernel'][:80]}`", f"{kernel['ms']:,.1f}", str(kernel["calls"])]


def variants(results: dict[str, Any]) -> Iterator[list[str]]:
    """One thing changed at a time; slower is meant against the first of its group."""
    yield ["", "ms", "ms a step", "slower, ms a step", "difference"]
    first: dict[str, float | None] = {}
    for name, row in results["variants"].items():
        ms_a_step = row.get("ms_a_step")
        program = first.setdefault(name.partition(":")[0], ms_a_step)
        slower = None if None in (ms_a_step, program) else ms_a_step - program
        yield [
            name, number(row.get("ms"), ".2f"), number(ms_a_step, ",.0f"), number(slower, "+,.1f"),
            row.get("failed") or number(row.get("difference"), ".1e"),
        ]  # fmt: skip


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[list[str]]]] = {
    table.__name__: table for table in (overview, speed, jobs, profile, longest, variants, recipes)
}


def number(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"


def dollars(hours: float | None) -> str:
    return NONE if hours is None else f"${hours * DOLLARS_PER_HOUR:.2f}"


def rendered(results: dict[str, Any], name: str) -> str:
    head, *rows = TABLES[name](results)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page_with_tables(text: str) -> str:
    """A page with the tables that it asks for."""

    def filled(asked: re.Match[str]) -> str:
        results = json.loads((ROOT / "benchmarks" / "results" / asked[2]).read_text())
        return asked[1] + "\n".join(rendered(results, one) for one in asked[3].split()) + asked[5]

    return ASKED.sub(filled, text)


def summary(results: dict[str, Any]) -> str:
    """All that there is to see."""
    needs = {"overview": "speed", "jobs": "speed", "longest": "profile"}
    tables = [table for table in TABLES if results.get(needs.get(table, table))]
    parts = [f"{json.dumps(results['machine'])}\n"]
    parts += [rendered(results, table) for table in tables]
    for name, row in results.get("determinism", {}).items():
        same = "the same" if row["cut_and_continued_is_identical"] else "OTHER"
        parts.append(f"{name}, cut and continued: {same} files\n")
    if found := results.get("doctor"):
        parts.append(
            f"doctor, {found['seconds']:.0f} s:\n\n```\n" + "\n".join(found["lines"]) + "```\n"
        )
    parts.append(f"complete: {', '.join(results['complete'])}\n")
    return "\n".join(parts)


def main(files: list[str]) -> None:
    for file in files:
        print(summary(json.loads(Path(file).read_text())))
    if not files:
        for page in PAGES:
            page.write_text(page_with_tables(page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
