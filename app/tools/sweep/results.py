"""The results of a sweep: sweep.json, sweep.csv and the table, with the spread over seeds."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from app.errors import UserError
from app.files import atomic_file, json_value, read_json, write_json
from app.runs.code import git_revision
from app.runs.metrics import read_metrics, total_seconds
from app.tools.sweep.plan import SEED, PlannedRun, label

FILE = "sweep.json"


@dataclass(frozen=True)
class Result:
    """A run that has ended.

    Attributes:
        values: value of each swept setting, by field
        held_out_loss: after its last step, or the lowest if it uses its best checkpoint; nats per
            token, None if it has diverged
        seconds: time that it took
        git_revision: of the program that trained it, None if that is not known
    """

    run: str
    values: dict[str, Any]
    status: Literal["complete", "diverged"]
    held_out_loss: float | None
    seconds: float
    git_revision: str | None


@dataclass(frozen=True)
class Combination:
    """Runs that differ in their seed only; `values` has every other swept setting."""

    values: dict[str, Any]
    results: list[Result]

    @property
    def losses(self) -> list[float]:
        """Return the held-out losses, without those of runs that have diverged."""
        return [it.held_out_loss for it in self.results if it.held_out_loss is not None]

    @property
    def mean(self) -> float | None:
        """Return the mean held-out loss; None if there is none."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def spread(self) -> float | None:
        """Return the standard deviation of the held-out losses; None with fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


def read_result(run: PlannedRun, *, diverged: bool) -> Result:
    """Read the result of a run that has ended."""
    folder = run.folder
    records = read_metrics(folder.metrics) if folder.metrics.exists() else []
    losses = [it.val_loss for it in records if it.val_loss is not None]
    loss = None
    if losses and not diverged:
        loss = min(losses) if run.settings.train.use_best else losses[-1]
    return Result(
        run.name,
        run.values,
        "diverged" if diverged else "complete",
        loss,
        round(total_seconds(records), 3),
        json_value(folder.settings, "git_revision"),
    )


def read_results(folder: Path, runs: Sequence[PlannedRun]) -> dict[str, Result]:
    """Return the results so far, by run; those whose run has been deleted are left out.

    Raises:
        UserError: the sweep has had other runs than these, or its file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    fix = f"delete {path}: the sweep writes it again, and complete runs stay"
    try:
        results = TypeAdapter(list[Result]).validate_python(read_json(path, fix).get("runs"))
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {error.errors()[0]['msg']}", fix) from None
    folders = {run.name: run.folder for run in runs}
    if others := [it.run for it in results if it.run not in folders]:
        raise UserError(
            f"{folder} holds a sweep of other values: {others[0]} is not among these runs",
            "name a new sweep with --run-name, or add values to those that it had",
        )
    return {it.run: it for it in results if folders[it.run].metrics.exists()}


def combinations(results: Sequence[Result]) -> list[Combination]:
    """Return the results by the values of all settings but the seed."""
    found: dict[str, Combination] = {}
    for result in results:
        values = {name: value for name, value in result.values.items() if name != SEED}
        found.setdefault(label(values), Combination(values, [])).results.append(result)
    return [*found.values()]


def best_of(found: Sequence[Combination]) -> Combination | None:
    """Return the combination of the lowest mean held-out loss, of which no run has diverged."""
    sound = [it for it in found if len(it.losses) == len(it.results)]
    return min(sound, key=lambda it: statistics.fmean(it.losses), default=None)


def write_results(folder: Path, results: Sequence[Result], planned: int) -> None:
    """Replace sweep.json and sweep.csv."""
    found = combinations(results)
    best = best_of(found)
    summary = [
        {"values": it.values, "mean": it.mean, "standard_deviation": it.spread,
         "seeds": len(it.losses), "runs": len(it.results), "is_best": it is best}
        for it in found
    ]  # fmt: skip
    runs = [asdict(it) for it in results]
    content = {"git_revision": git_revision(), "planned_runs": planned}
    write_json(folder / FILE, content | {"combinations": summary, "runs": runs})
    names = ["run", *results[0].values, "status", "held_out_loss", "seconds", "git_revision"]
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(run | run["values"] for run in runs)
    with atomic_file(folder / "sweep.csv") as file:
        file.write(rows.getvalue().encode())


def table(found: Sequence[Combination]) -> str:
    """Return a line for each combination: its values, held-out loss, seeds, and the best marked."""
    best = best_of(found)
    rows = [[*found[0].values, "held-out loss", "seeds", ""]]
    for it in found:
        loss = "-" if it.mean is None else f"{it.mean:.4f}"
        loss += "" if it.spread is None else f" ± {it.spread:.4f}"
        diverged = len(it.results) - len(it.losses)
        note = "best" if it is best else f"{diverged} diverged" if diverged else ""
        rows.append([*map(str, it.values.values()), loss, str(len(it.losses)), note])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
