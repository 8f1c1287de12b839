"""The key figures and tables of a report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.data.sequences import num_held_out
from app.formats import flatten, format_count, format_duration, format_gib
from app.runs.metrics import perplexity
from app.tools.report.curves import finite
from app.tools.report.run_data import Run

_MACHINE = ("device", "processes", "machine", "versions", "parameters")
# Settings of commands that did not make the run.
_OF_TOOLS = ("EVALUATE_", "EXPORT_", "PLAYGROUND_", "REPORT_")
_MOST_IN_TITLE = 8


@dataclass(frozen=True)
class Figure:
    """A key figure, with a note that explains it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: a value per run, empty if the run has none."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Return True if the runs' values differ."""
        return len(set(self.values)) > 1


def title(names: Sequence[str]) -> str:
    """Return the names of the runs, or how many there are."""
    return " · ".join(names) if len(names) <= _MOST_IN_TITLE else f"{len(names)} runs"


def describe(run: Run) -> str:
    """Return a line with the size of the model, the data and the device."""
    parameters, dataset = run.number("parameters"), run.get("dataset", "folder")
    processes, device = run.number("processes") or 1, run.get("device", "name")
    parts = (
        f"{format_count(parameters)} parameters" if parameters else "",
        f"{format_count(run.metrics['tokens'][-1])} tokens{f' of {dataset}' if dataset else ''}",
        f"{f'{processes:g} x ' if processes > 1 else ''}{device}" if device else "",
    )
    return "  ·  ".join(filter(None, parts))


def figures(run: Run) -> list[Figure]:
    """Return the key figures of a run that are known."""
    return [*_loss_figures(run), *_progress_figures(run)]


def _loss_figures(run: Run) -> Iterator[Figure]:
    held_out, train = run.metrics["val_loss"], finite(run.metrics["train_loss"])
    (measured,) = np.isfinite(held_out).nonzero()
    if measured.size:
        last, best = held_out[measured[-1]], measured[held_out[measured].argmin()]
        lowest = f"lowest {held_out[best]:.4f} after {best + 1:,} steps"
        note = "nats per token" if best == measured[-1] else lowest
        note += f", on {tokens:,} tokens" if (tokens := _held_out_tokens(run)) else ""
        yield Figure("held-out loss", f"{last:.4f}", note)
        yield Figure("perplexity", f"{perplexity(last):.4g}", "held-out")
    if (answered := finite(run.metrics["hellaswag"])).size:
        yield Figure("HellaSwag", f"{answered[-1]:.2%}", "acc_norm; by chance 25 %")
    if train.size:
        yield Figure("training loss", f"{train[-1]:.4f}", "of the last step")


def _held_out_tokens(run: Run) -> int:
    """Return on how many tokens a held-out loss was measured; 0 if that is not known."""
    limit, length = (
        int(run.number("settings", *path) or 0)
        for path in (("train", "val_tokens"), ("model", "context_length"))
    )
    available = int(run.number("dataset", "val_tokens") or 0)
    return length * num_held_out(available, length, limit) if length and limit else 0


def _progress_figures(run: Run) -> Iterator[Figure]:
    tokens, seconds = run.metrics["tokens"][-1], run.total_seconds
    of_steps = "all done" if run.steps == run.planned_steps else f"of {run.planned_steps:,}"
    of_steps += f"; began as {origin}" if (origin := run.get("origin")) else ""
    of_steps += f"; from {weights}" if (weights := run.get("initial_weights")) else ""
    yield Figure("steps", f"{run.steps:,}", of_steps)
    yield Figure("tokens", format_count(tokens), f"{tokens:,.0f}")
    if skipped := np.nansum(run.metrics["skipped"]):
        yield Figure("skipped updates", f"{skipped:,.0f}", "gradients overflowed in fp16")
    in_steps = np.nansum(run.metrics["step_ms"]) / 1000
    note = f"{in_steps / seconds:.0%} in steps" if seconds else ""
    yield Figure("time", format_duration(seconds), note)
    average = f"{format_count(tokens / seconds)} with start and pauses" if seconds else ""
    for name, column, form, note in (
        ("median tokens/s", "tokens_per_second", format_count, average),
        ("median MFU", "mfu", "{:.1%}".format, ""),
    ):
        if (values := run.after_first_step(column)).size:
            yield Figure(name, form(float(np.median(values))), note)
    memory, total = finite(run.metrics["memory_bytes"]), run.number("device", "memory_bytes")
    if memory.size:
        note = f"{memory.max() / total:.0%} of {format_gib(total)}" if total else "peak"
        yield Figure("memory", format_gib(memory.max()), note)
    if run.cost is not None:
        price = run.number("settings", "train", "price_per_hour")
        yield Figure("cost", f"{run.cost:,.2f}", f"{price:g} per hour")


def comparison(runs: Sequence[Run]) -> list[Row]:
    """Return the key figures of several runs side by side, lowest losses and origins."""
    columns = [{figure.name: figure.value for figure in figures(run)} for run in runs]
    for run, column in zip(runs, columns, strict=True):
        if "held-out loss" in column:
            column["lowest held-out loss"] = f"{finite(run.metrics['val_loss']).min():.4f}"
        column["began as"] = run.get("origin") or ""
        column["began with the weights of"] = run.get("initial_weights") or ""
        column["code"] = _code(run)
    return _rows(columns)


def _code(run: Run) -> str:
    """Return the commit of a run's code, whether and when it differed, and its hash."""
    paths = ("git_revision",), ("source", "sha256")
    revision, sha256 = (str(run.get(*path) or "")[:10] for path in paths)
    changed = f"{revision} with changes" if run.get("source", "differs") is True else revision
    later = (f"other code after {step:,} steps" for step in run.patches if step)
    return ", ".join(filter(None, (changed, sha256 and f"SHA-256 {sha256}", *later)))


def times(runs: Sequence[Run]) -> list[Row]:
    """Return where the time went: duration and share of each kind of work."""
    columns = [
        {kind: _spent(seconds, run.total_seconds) for kind, seconds in run.times().items()}
        for run in runs
    ]
    return _rows(columns)


def _spent(seconds: float, total: float) -> str:
    return f"{format_duration(seconds)}  ({seconds / total:.1%})" if seconds > 0 else ""


def tables(runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Return the tables of what settings.json records, by title."""
    settings = _metadata_rows([run.get("settings") for run in runs], _variable)
    machine = [{key: run.get(key) for key in _MACHINE} for run in runs]
    if len(runs) == 1:  # The results of several have it.
        machine[0]["code"] = _code(runs[0])
    return {
        "Settings": [row for row in settings if not row.name.startswith(_OF_TOOLS)],
        "Dataset": _metadata_rows([run.get("dataset") for run in runs], _words),
        "Hardware and versions": _metadata_rows(machine, _words),
    }


def _metadata_rows(objects: Sequence[Any], name: Callable[[tuple[str, ...]], str]) -> list[Row]:
    columns = [
        {name(path): _text(path[-1], value) for path, value in flatten(each) if path}
        for each in objects
    ]
    return _rows(columns)


def _rows(columns: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return the rows of a table whose columns are the runs', without empty rows."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [Row(name, [column.get(name, "") for column in columns]) for name in names]
    return [row for row in rows if any(row.values)]


def _variable(path: tuple[str, ...]) -> str:
    """Return the name of a setting's environment variable."""
    return "_".join(path[1:] if path[0] == "general" else path).upper()


def _words(path: tuple[str, ...]) -> str:
    return " ".join(path).replace("_", " ").removesuffix(" bytes")


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if key.endswith("_bytes") and isinstance(value, int | float):
        return format_gib(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
