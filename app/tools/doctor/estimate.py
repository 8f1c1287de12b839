"""The estimate of a run's time and cost, from the device's measurements."""

from collections.abc import Iterator
from dataclasses import dataclass

from app.formats import format_duration
from app.tools.doctor.case import Case
from app.tools.doctor.finding import Finding, counted

# The share of the rate of large matrix products that a step of GPT-2's size reaches.
_LEAST_MFU, _MOST_MFU = 0.25, 0.6
# A forward pass is a third of a step's work.
_EVALUATION_SHARE = 1 / 3
_LONG_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Estimate:
    """The time of what is left of a run, from its start to its end on this machine.

    Attributes:
        seconds: at least and at most; the same where steps were measured
        how: it was estimated
    """

    seconds: tuple[float, float]
    how: str

    def cost(self, price_per_hour: float) -> tuple[float, float]:
        """At least and at most."""
        least, most = self.seconds
        return least / 3600 * price_per_hour, most / 3600 * price_per_hour


def estimate(case: Case) -> Estimate | None:
    """Estimate the steps that are left and their evaluations; None without a measurement.

    Where several processes train, they are taken to be as fast together as each of them alone.
    """
    trial = case.trial
    if trial is None or not (trial.micro_batch_tokens or trial.matmul_flops):
        return None
    tokens = _tokens(case)
    if trial.micro_batch_tokens == 0:
        work = tokens * trial.model_flops_per_token / (trial.processes * trial.matmul_flops)
        how = (
            f"{_LEAST_MFU:.0%} to {_MOST_MFU:.0%} of the measured "
            f"{trial.matmul_flops / 1e12:.3g} TFLOP/s: no step could be measured"
        )
        return Estimate((work / _MOST_MFU, work / _LEAST_MFU), how)
    rate = trial.processes * trial.micro_batch_tokens / trial.micro_batch_seconds
    seconds = tokens / rate + case.steps_left * trial.optimizer_seconds
    if case.steps_left:
        seconds += trial.compile_seconds
    many = f"{trial.processes} processes as fast as this one: " if trial.processes > 1 else ""
    how = (
        f"{many}{rate:,.0f} tokens/s, measured now on {trial.micro_batch_tokens:,} at once, "
        f"{'compiled' if trial.compile_seconds else 'not compiled'}"
    )
    return Estimate((seconds, seconds), how)


def _tokens(case: Case) -> float:
    """Return the tokens left to train on; evaluations count by their share of the work."""
    chosen = case.settings.train
    measured = 0
    if chosen.val_every and case.steps_left:
        measured = chosen.max_steps // chosen.val_every - case.steps_done // chosen.val_every
        measured += chosen.max_steps % chosen.val_every > 0
    held_out = case.settings.prepare.val_tokens if case.val_tokens is None else case.val_tokens
    of_evaluations = measured * min(chosen.val_tokens, held_out)
    return case.steps_left * chosen.tokens_per_step + _EVALUATION_SHARE * of_evaluations


def check_duration(case: Case) -> Iterator[Finding]:
    """Duration and cost of what is left of the run."""
    chosen, found = case.settings.train, estimate(case)
    if found is None or case.trial is None:
        yield Finding("duration", "skip", "not estimated: nothing could be measured on the device")
        return
    if case.steps_left == 0:
        yield Finding("duration", "pass", "nothing is left to do")
        return
    least, most = map(format_duration, found.seconds)
    said = (
        f"{f'about {most}' if least == most else f'{least} to {most}'} for "
        f"{counted(case.steps_left, 'step')} of {chosen.tokens_per_step:,} tokens: {found.how}"
    )
    if max(found.seconds) <= _LONG_SECONDS:
        yield Finding("duration", "pass", said)
    elif case.trial.device_type == "cpu":
        fix = "train on a GPU (docs/cloud.md), or on less: RECIPE=demo takes minutes"
        yield Finding("duration", "warn", said, fix)
    else:
        fix = "use more or faster GPUs, or fewer steps (TRAIN_MAX_STEPS)"
        yield Finding("duration", "warn", said, fix)
    if chosen.price_per_hour is None:
        yield Finding("cost", "skip", "not known: TRAIN_PRICE_PER_HOUR is not set")
        return
    low, high = (f"{cost:,.2f}" for cost in found.cost(chosen.price_per_hour))
    said = high if low == high else f"{low} to {high}"
    said += f" at {chosen.price_per_hour:g} an hour; installation and prepare come on top"
    yield Finding("cost", "pass", said)
