"""The pace of a run: how long its steps and the pauses between them take, and so what is left."""

from collections import deque
from collections.abc import Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import Self

from app.runs.metrics import PAUSES, StepRecord
from app.settings.train import TrainSettings
from app.train.advice import EVALUATION_SHARE

MIN_MEASURED_STEPS = 3
_MAX_MEASURED_STEPS = 100


class Pace:
    """Predicts how long the rest of a run takes, from its latest steps and pauses.

    Args:
        cfg: the intervals, and the tokens of a step.
        held_out_tokens: tokens of a held-out loss.
    """

    def __init__(self, cfg: TrainSettings, held_out_tokens: int) -> None:
        self._held_out_steps = held_out_tokens / cfg.tokens_per_step
        intervals = {
            "val_ms": cfg.val_every if held_out_tokens else 0,
            "hellaswag_ms": cfg.hellaswag_every,
            "sample_ms": cfg.sample_every,
            "save_ms": cfg.checkpoint_every,
        }
        self._intervals = {kind: every for kind, every in intervals.items() if every}
        self._step_seconds: deque[float] = deque(maxlen=_MAX_MEASURED_STEPS)
        self._pauses: dict[str, float] = {}

    def with_earlier(self, records: Sequence[StepRecord]) -> Self:
        """Add what earlier starts of the run have measured."""
        for record in records[-_MAX_MEASURED_STEPS:]:
            # The first step of a start has waited for the compiler.
            if record.step_ms is not None and record.setup_ms is None:
                pauses = {kind: getattr(record, kind) for kind in PAUSES}
                self.add(record.step_ms / 1000, {k: v for k, v in pauses.items() if v is not None})
        return self

    def add(self, step_seconds: float, pauses: Mapping[str, float]) -> None:
        """Add a step, and the milliseconds that the last pause of each kind took."""
        self._step_seconds.append(step_seconds)
        self._pauses |= pauses

    @property
    def measured_steps(self) -> int:
        """Return how many steps have been measured, up to 100."""
        return len(self._step_seconds)

    def seconds_left(self, steps_completed: int, steps: int) -> float:
        """Return the seconds that are left of a run of `steps` steps.

        Args:
            steps_completed: the evaluation, samples and checkpoint after them are still to come.
        """
        step_seconds = fmean(self._step_seconds or [0.0])
        seconds = {"val_ms": EVALUATION_SHARE * self._held_out_steps * step_seconds}
        seconds |= {kind: milliseconds / 1000 for kind, milliseconds in self._pauses.items()}
        # Everything that has an interval is also done after the last step.
        return (steps - steps_completed) * step_seconds + sum(
            (ceil(steps / every) - max(0, steps_completed - 1) // every) * seconds.get(kind, 0.0)
            for kind, every in self._intervals.items()
        )
