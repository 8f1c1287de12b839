"""The words and tables of a report."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.formats import flatten, format_count, format_duration, format_gib
from app.runs.metrics import perplexity
from app.tools.report.curves import finite
from app.tools.report.run_data import Run


@dataclass(frozen=True)
class Figure:
    """A key figure; `note` says more of it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table: a value for each run, empty where a run has none."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Return True if the runs' values differ."""
        return len(set(self.values)) > 1


def describe(run: Run) -> str:
    """A run in a line: size of the model, data, device."""
    parameters, data = run.number("parameters"), run.fact("dataset", "folder")
    processes = run.number("processes") or 1
    device = run.fact("device", "name")
    parts = (
        f"{format_count(parameters)} parameters" if parameters else "",
        f"{format_count(run.metrics['tokens'][-1])} tokens{f' of {data}' if data else ''}",
        f"{f'{processes:g} x ' if processes > 1 else ''}{device}" if device else "",
    )
    return "  ·  ".join(filter(None, parts))


def figures(run: Run) -> list[Figure]:
    """The key figures of a run, as far as they are known."""
    return [*_losses(run), *_progress(run)]


def _losses(run: Run) -> Iterable[Figure]:
    held_out = run.metrics["val_loss"]
    (measured,) = np.isfinite(held_out).nonzero()
    if measured.size:
        last, best = held_out[measured[-1]], measured[held_out[measured].argmin()]
        lowest = f"lowest {held_out[best]:.4f} after {best + 1:,} steps"
        note = "nats per token" if best == measured[-1] else lowest
        yield Figure("held-out loss", f"{last:.4f}", note)
        yield Figure("perplexity", f"{perplexity(last):.4g}", "held-out")
    trained = finite(run.metrics["train_loss"])
    if trained.size:
        yield Figure("training loss", f"{trained[-1]:.4f}", "of the last step")


def _progress(run: Run) -> Iterable[Figure]:
    tokens, time = run.metrics["tokens"][-1], sum(run.times().values())
    state = "all done" if run.steps == run.planned_steps else f"of {run.planned_steps:,}"
    yield Figure("steps", f"{run.steps:,}", state)
    yield Figure("tokens", format_count(tokens), f"{tokens:,.0f}")
    trained = np.nansum(run.metrics["step_ms"]) / 1000
    yield Figure("time", format_duration(time), f"{trained / time:.0%} in steps" if time else "")
    for name, column, form in (
        ("tokens/s", "tokens_per_second", format_count),
        ("MFU", "mfu", "{:.1%}".format),
    ):
        if run.known(column).size:
            yield Figure(name, form(float(np.median(run.known(column)))), "median")
    memory, whole = finite(run.metrics["memory_bytes"]), run.number("device", "memory_bytes")
    if memory.size:
        part = f"{memory.max() / whole:.0%} of {format_gib(whole)}" if whole else "at most"
        yield Figure("memory", format_gib(memory.max()), part)
    if run.cost is not None:
        price = run.number("settings", "train", "price_per_hour")
        yield Figure("cost", f"{run.cost:,.2f}", f"{price:g} an hour")


def numbers(runs: Sequence[Run]) -> list[Row]:
    """The key figures of several runs beside each other, and their best held-out losses."""
    tables = [{one.name: one.value for one in figures(run)} for run in runs]
    for run, table in zip(runs, tables, strict=True):
        if "held-out loss" in table:
            table["lowest held-out loss"] = f"{finite(run.metrics['val_loss']).min():.4f}"
    names = dict.fromkeys(name for table in tables for name in table)
    return [Row(name, [table.get(name, "") for table in tables]) for name in names]


def settings(runs: Sequence[Run]) -> list[Row]:
    """Every setting, by the name of its variable."""

    def name(path: tuple[str, ...]) -> str:
        return "_".join(path[1:] if path[0] == "general" else path).upper()

    return _rows([flatten(run.fact("settings") or {}) for run in runs], name)


def dataset(runs: Sequence[Run]) -> list[Row]:
    """Return the facts about the datasets of the runs."""
    return _rows([flatten(run.fact("dataset") or {}) for run in runs], _words)


def machine(runs: Sequence[Run]) -> list[Row]:
    """Hardware and versions."""
    kept = ("device", "processes", "machine", "versions", "git_revision", "parameters")
    return _rows(
        [flatten({name: run.fact(name) for name in kept if run.fact(name)}) for run in runs], _words
    )


def times(runs: Sequence[Run]) -> list[Row]:
    """Return the table of where the time went."""
    spent = [run.times() for run in runs]
    return [
        Row(
            kind,
            [
                f"{format_duration(t[kind])}  ({t[kind] / (sum(t.values()) or 1):.1%})"
                for t in spent
            ],
        )
        for kind in spent[0]
        if any(t[kind] > 0 for t in spent)
    ]


def _words(path: tuple[str, ...]) -> str:
    return " ".join(path).replace("_", " ").removesuffix(" bytes")


def _rows(
    tables: Sequence[Iterable[tuple[tuple[str, ...], Any]]],
    name: Callable[[tuple[str, ...]], str],
) -> list[Row]:
    read = [{name(path): _value(path, value) for path, value in table if path} for table in tables]
    names = dict.fromkeys(name for table in read for name in table)
    rows = [Row(name, [table.get(name, "") for table in read]) for name in names]
    return [row for row in rows if any(row.values)]


def _value(path: tuple[str, ...], value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if path[-1].endswith("_bytes") and isinstance(value, int | float):
        return format_gib(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
