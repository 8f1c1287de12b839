"""The data of a run, read from its folder."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from app.errors import UserError
from app.files import again_if_stale, filename_in_errors, read_json
from app.runs.checkpoints import missing_run_error
from app.runs.code import read_patches
from app.runs.metrics import COLUMNS, PAUSES, parse_metrics
from app.runs.samples import read_samples
from app.tools.report.curves import Floats, finite


@dataclass(frozen=True)
class Run:
    """A run, which may still be training.

    Attributes:
        metrics: float64 [steps] per column, NaN where not measured; `seconds` is the time from
            the start of the run to the end of each step, as far as the metrics record it
        samples: (steps completed, texts)
        metadata: content of settings.json
        notes: what could not be read
        patches: the code as it was from a step on, see app.runs.code.read_patches
    """

    name: str
    metrics: dict[str, Floats]
    samples: list[tuple[int, list[str]]]
    metadata: dict[str, Any]
    notes: list[str]
    patches: dict[int, str] = field(default_factory=dict)

    def get(self, *path: str) -> Any:
        """Return a value from the nested objects of settings.json; None if it is missing."""
        value: Any = self.metadata
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *path: str) -> float | None:
        """Return a finite number from settings.json; None if the value is not one."""
        value = self.get(*path)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and np.isfinite(value) else None

    def after_first_step(self, column: str) -> Floats:
        """Return a column's finite values, without the first step, which may compile."""
        values = self.metrics[column]
        return finite(values[len(values) > 1 :])

    @property
    def steps(self) -> int:
        """Return the number of completed steps."""
        return int(self.metrics["step"][-1]) + 1

    @property
    def planned_steps(self) -> int:
        """Return the number of steps of the complete run."""
        steps = self.number("planned_steps") or self.number("settings", "train", "max_steps")
        return max(self.steps, int(steps or 0))

    @cached_property
    def total_seconds(self) -> float:
        """Return the time that the metrics record."""
        return sum(self.times().values())

    @property
    def cost(self) -> float | None:
        """Return the cost of the recorded time; None without a price."""
        price = self.number("settings", "train", "price_per_hour")
        return None if price is None else price * self.total_seconds / 3600

    def times(self) -> dict[str, float]:
        """Return the seconds of each kind of work, as far as the metrics record them."""
        spent = {name: _seconds(self.metrics[name]) for name in ("step_ms", "data_ms", *PAUSES)}
        steps, waited = spent["step_ms"], spent["data_ms"]
        is_first = np.isfinite(self.metrics["setup_ms"])
        is_first[:1] = True
        # The first step after a start also compiles, warms up and fills caches.
        usual = float(np.median(steps[~is_first])) if (~is_first).any() else np.inf
        compiling = float(np.maximum(0, steps[is_first] - usual).sum())
        return {
            "training": float(steps.sum() - waited.sum()) - compiling,
            "waiting for data": float(waited.sum()),
            "first steps, compiling": compiling,
            "held-out loss": float(spent["val_ms"].sum()),
            "HellaSwag": float(spent["hellaswag_ms"].sum()),
            "samples": float(spent["sample_ms"].sum()),
            "checkpoints": float(spent["save_ms"].sum()),
            "starting": float(spent["setup_ms"].sum()),
        }


class RunReader:
    """Reads a run again and again while it trains: of its metrics, what has come since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._forget()

    def _forget(self) -> None:
        self._bytes, self._last_line = 0, b""
        self._columns = {name: np.empty(0) for name in COLUMNS}

    def read(self) -> Run:
        """Read metrics.jsonl, settings.json and samples.txt.

        Raises:
            UserError: there is no such run, it has no step yet, or its metrics are damaged.
        """
        if not self._folder.is_dir():
            raise missing_run_error(self._folder)
        path = self._folder / "metrics.jsonl"
        if path.is_file():
            with filename_in_errors(path):
                again_if_stale(lambda: self._read_new(path))
        if not path.is_file() or not len(self._columns["step"]):
            raise UserError(f"{path} has no steps", "wait until the run has completed one")
        metrics = dict(self._columns)
        spent = sum(_seconds(metrics[name]) for name in ("step_ms", *PAUSES))
        # Evaluations come after their step.
        after = sum(_seconds(metrics[name]) for name in ("val_ms", "hellaswag_ms"))
        metrics["seconds"] = np.cumsum(spent) - after
        metadata, notes = _read_metadata(self._folder / "settings.json")
        samples = read_samples(self._folder / "samples.txt")
        patches = read_patches(self._folder)
        return Run(self._folder.absolute().name, metrics, samples, metadata, notes, patches)

    def _read_new(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._bytes - len(self._last_line))
            # A start cuts the file back to the checkpoint, and a new run may take a deleted one's
            # name and inode.
            if file.read(len(self._last_line)) != self._last_line:
                self._forget()
                file.seek(0)
            content = file.read()
        new = list(parse_metrics(content, path, 1 + len(self._columns["step"])))
        for _, line in new:
            self._bytes, self._last_line = self._bytes + len(line), line
        for name, column in self._columns.items():
            values = np.array([getattr(record, name) for record, _ in new], dtype=np.float64)
            self._columns[name] = np.concatenate([column, values])


def read_run(folder: Path) -> Run:
    """Read a run once; see RunReader.read."""
    return RunReader(folder).read()


def _read_metadata(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the content of settings.json, and notes on what is wrong with it."""
    if not path.is_file():
        return {}, ["settings.json is missing: settings, data and hardware are not known"]
    try:
        return read_json(path, "restore it"), []
    except UserError as error:
        return {}, [f"{error.problem}: settings, data and hardware are not known"]


def _seconds(milliseconds: Floats) -> Floats:
    """Return a column in seconds; unknown values count as 0."""
    return np.where(np.isfinite(milliseconds), milliseconds, 0.0) / 1000
