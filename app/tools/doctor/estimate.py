"""The estimate of a run's time and cost, from the device's measurements."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from app.formats import format_duration, plural
from app.settings.train import TrainSettings
from app.tools.doctor.checks import Context, Finding, graded
from app.train.advice import (
    EVALUATION_SHARE,
    LONG_SECONDS,
    MAX_MFU,
    QUESTION_TOKENS,
    advise_on_speed,
    shorter_run,
)

# The share of the rate of large matrix products that a step of GPT-2's size reaches.
_MIN_MFU = 0.25


@dataclass(frozen=True)
class Estimate:
    """The time that the remaining steps of a run take on this machine, from its start to its end.

    Attributes:
        seconds: lower and upper bound; equal where training was measured
        basis: what the estimate is based on, for the user
        limit: seconds that TRAIN_MAX_HOURS leaves for these steps
    """

    seconds: tuple[float, float]
    basis: str
    limit: float = inf

    def cost(self, cfg: TrainSettings) -> tuple[float, float] | None:
        """Return the cost, at least and at most, within the time limit; None without a price."""
        if cfg.price_per_hour is None:
            return None
        low, high = (min(it, self.limit) / 3600 for it in self.seconds)
        return low * cfg.price_per_hour, high * cfg.price_per_hour


def estimate(context: Context) -> Estimate | None:
    """Estimate the remaining steps and their evaluations; None without a measurement.

    Several processes are taken to be as fast together as each of them alone.
    """
    report, tokens = context.report, _remaining_tokens(context)
    max_hours = context.settings.train.max_hours
    limit = max(0.0, 3600 * max_hours - context.elapsed_seconds) if max_hours else inf
    if report is not None and report.micro_batch_tokens:
        rate = report.processes * report.micro_batch_tokens / report.micro_batch_seconds
        seconds = tokens / rate + context.remaining_steps * report.optimizer_seconds
        seconds += report.compile_seconds if context.remaining_steps else 0
        count = f"{report.processes} processes as fast as this one: "
        return Estimate(
            (seconds, seconds),
            f"{count if report.processes > 1 else ''}{rate:,.0f} tokens/s, measured now on "
            f"{report.micro_batch_tokens:,} at once, "
            f"{'compiled' if report.compile_seconds else 'not compiled'}",
            limit,
        )
    if report is not None and report.matmul_flops:
        seconds = tokens * report.model_flops_per_token / (report.processes * report.matmul_flops)
        return Estimate(
            (seconds / MAX_MFU, seconds / _MIN_MFU),
            f"{_MIN_MFU:.0%} to {MAX_MFU:.0%} of the measured "
            f"{report.matmul_flops / 1e12:.3g} TFLOP/s: no step could be measured",
            limit,
        )
    return None


def _remaining_tokens(context: Context) -> float:
    """Return the tokens left to train on; evaluations count by their share of the work."""
    cfg, held_out = context.settings.train, context.val_tokens
    if held_out is None:
        held_out = context.settings.prepare.val_tokens
    evaluated = _evaluations(context, cfg.val_every) * min(cfg.val_tokens, held_out)
    answered = _evaluations(context, cfg.hellaswag_every) * context.questions
    evaluated += answered * QUESTION_TOKENS
    return context.remaining_steps * cfg.tokens_per_step + EVALUATION_SHARE * evaluated


def _evaluations(context: Context, every: int) -> int:
    """Return how often something is still measured at an interval and at the end."""
    steps = context.steps
    if not every or not context.remaining_steps:
        return 0
    return steps // every - context.steps_completed // every + (steps % every > 0)


def check_duration(context: Context) -> Iterator[Finding]:
    """Estimate the duration and the cost of the remaining steps."""
    cfg, expected = context.settings.train, estimate(context)
    if expected is None or context.report is None:
        yield Finding("duration", "skip", "not estimated: nothing could be measured on the device")
        return
    if context.remaining_steps == 0:
        yield Finding("duration", "pass", "nothing is left to do")
        return
    low, high = map(format_duration, expected.seconds)
    limit, longest = "", max(expected.seconds)
    if longest > expected.limit:
        share = expected.limit / longest
        limit = (
            f"; TRAIN_MAX_HOURS={cfg.max_hours:g} ends the run after about "
            f"{context.steps_completed + int(share * context.remaining_steps):,} steps"
        )
    is_slower = cfg.compile and not context.report.compile_seconds
    on_cpu = context.report.device_type == "cpu"
    fix = shorter_run(longest, context.remaining_steps, on_cpu=on_cpu)
    yield graded(
        "duration",
        f"{f'about {high}' if low == high else f'{low} to {high}'} for "
        f"{plural(context.remaining_steps, 'step')} of {cfg.tokens_per_step:,} tokens: "
        f"{expected.basis}{limit}",
        ("warn", longest > LONG_SECONDS and not limit, fix),
        ("warn", is_slower, "make compiling work, see above: compiled code is faster"),
    )
    step_hours = min(expected.seconds) / 3600 / context.remaining_steps
    for advice in advise_on_speed(cfg, step_hours, context.remaining_steps):
        yield Finding("plan", "warn", *advice)
    if (bounds := expected.cost(cfg)) is None:
        yield Finding("cost", "skip", "not known: TRAIN_PRICE_PER_HOUR is not set")
        return
    low, high = (f"{cost:,.2f}" for cost in bounds)
    cost = high if low == high else f"{low} to {high}"
    found = f"{cost} at {cfg.price_per_hour:g} an hour; installation and prepare come on top"
    yield Finding("cost", "pass", found)
