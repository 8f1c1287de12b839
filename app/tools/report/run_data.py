"""The data of a run, read from its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.errors import UserError
from app.files import read_json
from app.runs.metrics import COLUMNS, PAUSES, read_metrics
from app.runs.samples import read_samples
from app.tools.report.curves import Floats, finite


@dataclass(frozen=True)
class Run:
    """A run, perhaps one that goes on.

    Attributes:
        metrics: float64 [steps] per column, NaN where not measured; `seconds` is the time from
            the start to the end of each step, as far as the metrics tell
        samples: (steps done, texts)
        facts: what settings.json holds
        notes: what could not be read
    """

    name: str
    metrics: dict[str, Floats]
    samples: list[tuple[int, list[str]]]
    facts: dict[str, Any]
    notes: list[str]

    def fact(self, *path: str) -> Any:
        """A value from nested objects of settings.json; None if there is none."""
        value: Any = self.facts
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def number(self, *path: str) -> float | None:
        """A fact that is a number; None if it is none."""
        value = self.fact(*path)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and np.isfinite(value) else None

    def known(self, column: str) -> Floats:
        """Return a column's finite values, without the first step, which may compile."""
        values = self.metrics[column]
        return finite(values[len(values) > 1 :])

    @property
    def steps(self) -> int:
        """Return how many steps are done."""
        return int(self.metrics["step"][-1]) + 1

    @property
    def planned_steps(self) -> int:
        """Return how many steps the run is to have."""
        return max(self.steps, int(self.number("settings", "train", "max_steps") or 0))

    @property
    def cost(self) -> float | None:
        """Return the cost of its known time; None without a price."""
        price = self.number("settings", "train", "price_per_hour")
        return None if price is None else price * sum(self.times().values()) / 3600

    def times(self) -> dict[str, float]:
        """Return the seconds of each kind of work, as far as the metrics tell."""
        spent = {name: seconds(self.metrics[name]) for name in ("step_ms", "data_ms", *PAUSES)}
        steps, waited = spent["step_ms"], spent["data_ms"]
        first = np.isfinite(self.metrics["setup_ms"])
        first[:1] = True
        # The first step is longer by compilation, warm-up and empty caches.
        usual = float(np.median(steps[~first])) if (~first).any() else np.inf
        compiled = float(np.maximum(0, steps[first] - usual).sum())
        return {
            "training": float(steps.sum() - waited.sum()) - compiled,
            "waiting for data": float(waited.sum()),
            "first steps, compiling": compiled,
            "held-out loss": float(spent["val_ms"].sum()),
            "samples": float(spent["sample_ms"].sum()),
            "checkpoints": float(spent["save_ms"].sum()),
            "starting": float(spent["setup_ms"].sum()),
        }


def read_run(folder: Path) -> Run:
    """Read metrics.jsonl, settings.json and samples.txt of a run.

    Raises:
        UserError: there is no such run, it has no step yet, or its metrics are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run in {folder}", "check TRAIN_RUN_NAME and DATA_DIR")
    path = folder / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    if not records:
        raise UserError(f"{path} holds no step", "let the run finish one, then draw it again")
    metrics = {
        name: np.array([getattr(record, name) for record in records], dtype=np.float64)
        for name in COLUMNS
    }
    passed = sum(seconds(metrics[name]) for name in ("step_ms", *PAUSES))
    # The held-out loss is measured after its step.
    metrics["seconds"] = np.cumsum(passed) - seconds(metrics["val_ms"])
    facts, notes = _facts(folder / "settings.json")
    samples = read_samples(folder / "samples.txt")
    return Run(folder.resolve().name, metrics, samples, facts, notes)


def _facts(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file():
        return {}, ["settings.json is missing: settings, data and hardware are not known"]
    try:
        return read_json(path, "restore it"), []
    except UserError as error:
        return {}, [f"{error.problem}: settings, data and hardware are not known"]


def seconds(milliseconds: Floats) -> Floats:
    """Return the seconds of a column; an unknown value counts as 0."""
    return np.where(np.isfinite(milliseconds), milliseconds, 0.0) / 1000
