"""How long the run takes and what it costs, from what the device has just shown."""

from collections.abc import Iterator
from dataclasses import dataclass

from app.tools.doctor.case import Case, Trial
from app.tools.doctor.finding import Finding

# Of the rate of large matrix products, where no step could be measured: what GPT-2's size reaches.
_LEAST_MFU, _MOST_MFU = 0.25, 0.6
# A forward pass is a third of a step's work.
_EVALUATION_SHARE = 1 / 3
_LONG_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Estimate:
    """Of what is left of a run, from its start to its end on this machine.

    Attributes:
        least_seconds, most_seconds: the same where steps were measured
        tokens_per_second: of all processes, as far as measured; 0 if not
        how: it was estimated
    """

    least_seconds: float
    most_seconds: float
    tokens_per_second: float
    how: str

    @property
    def duration(self) -> str:
        """In words."""
        least, most = lasting(self.least_seconds), lasting(self.most_seconds)
        return f"about {most}" if least == most else f"{least} to {most}"


def estimate(case: Case) -> Estimate | None:
    """Of the steps that are left and their evaluations; None if the device has shown nothing.

    Where several processes train, they are taken to be as fast together as each of them alone.
    """
    trial = case.trial
    if trial is None or not (trial.micro_batch_tokens or trial.matmul_flops):
        return None
    tokens = _tokens(case)
    if trial.micro_batch_tokens:
        rate = trial.processes * trial.micro_batch_tokens / trial.micro_batch_seconds
        seconds = (
            tokens / rate
            + case.steps_left * trial.optimizer_seconds
            + (trial.compile_seconds if case.steps_left else 0)
        )
        return Estimate(seconds, seconds, rate, _how(trial, rate))
    work = tokens * trial.model_flops_per_token / (trial.processes * trial.matmul_flops)
    return Estimate(
        work / _MOST_MFU,
        work / _LEAST_MFU,
        0.0,
        f"{_LEAST_MFU:.0%} to {_MOST_MFU:.0%} of the measured {trial.matmul_flops / 1e12:.3g} "
        "TFLOP/s: no step could be measured",
    )


def _tokens(case: Case) -> float:
    """What is left to train on; what evaluations take is counted as the share of it that it is."""
    chosen = case.settings.train
    measured = 0
    if chosen.val_every and case.steps_left:
        measured = chosen.max_steps // chosen.val_every - case.steps_done // chosen.val_every
        measured += chosen.max_steps % chosen.val_every > 0
    held_out = case.settings.prepare.val_tokens if case.val_tokens is None else case.val_tokens
    of_evaluations = measured * min(chosen.val_tokens, held_out)
    return case.steps_left * chosen.tokens_per_step + _EVALUATION_SHARE * of_evaluations


def _how(trial: Trial, rate: float) -> str:
    many = f"{trial.processes} processes as fast as this one: " if trial.processes > 1 else ""
    return (
        f"{many}{rate:,.0f} tokens/s, measured now on {trial.micro_batch_tokens:,} at once, "
        f"{'compiled' if trial.compile_seconds else 'not compiled'}"
    )


def check_duration(case: Case) -> Iterator[Finding]:
    """Duration and cost of what is left of the run."""
    chosen = case.settings.train
    found = estimate(case)
    if found is None:
        yield Finding("duration", "skip", "not estimated: nothing could be measured on the device")
        return
    if case.steps_left == 0:
        yield Finding("duration", "pass", "nothing is left to do")
        return
    said = (
        f"{found.duration} for {case.steps_left:,} steps of {chosen.tokens_per_step:,} tokens: "
        f"{found.how}"
    )
    if found.most_seconds > _LONG_SECONDS:
        assert case.trial is not None
        yield Finding(
            "duration",
            "warn",
            said,
            "train on a GPU (docs/cloud.md), or on less: RECIPE=demo takes minutes"
            if case.trial.device_type == "cpu"
            else "use more or faster GPUs, or fewer steps (TRAIN_MAX_STEPS)",
        )
    else:
        yield Finding("duration", "pass", said)
    if chosen.price_per_hour is None:
        yield Finding("cost", "skip", "not known: TRAIN_PRICE_PER_HOUR is not set")
    else:
        least, most = (
            seconds / 3600 * chosen.price_per_hour
            for seconds in (found.least_seconds, found.most_seconds)
        )
        sums = f"{most:,.2f}" if least == most else f"{least:,.2f} to {most:,.2f}"
        yield Finding(
            "cost",
            "pass",
            f"{sums} at {chosen.price_per_hour:g} an hour; installation and prepare come on top",
        )


def lasting(seconds: float) -> str:
    """90 is 1.5 min, 800_000 is 9.3 days: two digits in the unit that suits."""
    for size, unit in ((14 * 86400, "weeks"), (2 * 86400, "days"), (5400, "h"), (90, "min")):
        if seconds >= size:
            whole = {"weeks": 604800, "days": 86400, "h": 3600, "min": 60}[unit]
            count = seconds / whole
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"
    return f"{seconds:.0f} s"
