"""The time limit of a run: how many steps fit into TRAIN_MAX_HOURS."""

from bisect import bisect_right

from app.formats import format_duration, plural
from app.runs.checkpoint_state import CheckpointState
from app.settings.settings import Settings
from app.settings.train import TrainSettings
from app.train.pace import MIN_MEASURED_STEPS, Pace

# Steps are planned after these shares of the time, or of the steps: soon, as the schedule depends
# on their number, and once more, because the first ones may be slow. After that it only falls.
_PLAN_AT = (0.02, 0.25)
# A plan leaves some time unused, so that small delays do not change it.
_USED_SHARE = 0.98
# The last checkpoint must reach the disk, and the process must end.
_SECONDS_AT_END, _SHARE_AT_END = 2.0, 0.01


def planned_steps(settings: Settings, state: CheckpointState | None) -> int | None:
    """Return the steps that a run's time limit has planned; None if they are to be planned anew.

    Args:
        state: that of the checkpoint from which the run continues.
    """
    if state is None or settings.train.max_hours is None:
        return None
    before, now = state.settings.get("train", {}), settings.public()["train"]
    is_same = all(before.get(name) == now[name] for name in ("max_hours", "max_steps"))
    return state.planned_steps if is_same else None


class TimeLimit:
    """Plans how many steps a run has, so that all its starts together take TRAIN_MAX_HOURS.

    Args:
        cfg: max_hours is set; max_steps is the largest number of steps.
        planned: number of steps that an earlier start has planned; None to plan them now.
        pace: measured by this start.
    """

    def __init__(self, cfg: TrainSettings, planned: int | None, pace: Pace) -> None:
        assert cfg.max_hours is not None
        self._hours, self._seconds = cfg.max_hours, 3600 * cfg.max_hours
        self._max_steps, self._planned, self._pace = cfg.max_steps, planned, pace
        self._plan_at: list[float] = [] if planned else [*_PLAN_AT]
        self._first_elapsed: float | None = None

    def plan(self, steps_completed: int, elapsed: float) -> int | None:
        """Return the number of steps of the whole run if it changes now. Call it after each step.

        Args:
            steps_completed: the evaluation, samples and checkpoint after them are still to come.
            elapsed: seconds that the run has taken so far.
        """
        if self._first_elapsed is None:
            self._first_elapsed = elapsed
        left = self._seconds - elapsed - _SECONDS_AT_END - _SHARE_AT_END * self._seconds

        def needed(steps: int) -> float:
            return self._pace.seconds_left(steps_completed, steps)

        if self._is_time_to_plan(steps_completed, elapsed):
            most = self._max_steps
        else:
            most = self._planned or self._max_steps
            if not self._planned or self._pace.measured_steps < MIN_MEASURED_STEPS:
                # There must be time for one more step.
                most = min(most, steps_completed + 1)
            if needed(most) <= left:
                return None
        candidates = range(steps_completed, max(most, steps_completed) + 1)
        fitting = bisect_right(candidates, _USED_SHARE * left, key=needed)
        steps = candidates[max(fitting, 1) - 1]
        is_change, self._planned = steps != self._planned, steps
        return steps if is_change else None

    def describe(self, steps: int) -> str:
        """Return the line that explains a plan of `steps` steps to the user."""
        limit = f"TRAIN_MAX_HOURS={self._hours:g}"
        if steps == self._max_steps:
            return f"{limit} is enough for all {plural(steps, 'step')} (TRAIN_MAX_STEPS)"
        return f"{limit} is enough for {steps:,} of {plural(self._max_steps, 'step')}"

    def summary(self, steps: int, elapsed: float) -> str:
        """Return the line that says how much of its time a run of `steps` steps has taken."""
        took, limit = format_duration(elapsed), format_duration(self._seconds)
        return f"{plural(steps, 'step')} took {took} of {limit} (TRAIN_MAX_HOURS={self._hours:g})"

    def _is_time_to_plan(self, steps_completed: int, elapsed: float) -> bool:
        assert self._first_elapsed is not None
        share = (elapsed - self._first_elapsed) / max(1e-9, self._seconds - self._first_elapsed)
        if self._planned:
            share = max(share, steps_completed / self._planned)
        is_due = bool(self._plan_at) and share >= self._plan_at[0]
        if not is_due or self._pace.measured_steps < MIN_MEASURED_STEPS:
            return False
        self._plan_at = [mark for mark in self._plan_at if mark > share]
        return True
