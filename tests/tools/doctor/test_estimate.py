from dataclasses import replace

import pytest

from app.tools.doctor.checks import Context, DeviceReport
from app.tools.doctor.estimate import check_duration, estimate
from tests.tools.doctor.conftest import NewContext

# 1,000 tokens in a second, and nothing else takes time.
REPORT = DeviceReport(
    "cpu", 1, matmul_flops=1e12, model_flops_per_token=1e8,
    micro_batch_tokens=256, micro_batch_seconds=0.256,
)  # fmt: skip


def estimated(context: Context) -> tuple[float, float]:
    found = estimate(context)
    assert found is not None
    return found.seconds


def test_passes_updates_evaluations_and_compilation_take_time(
    new_context: NewContext,
) -> None:
    context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0)
    context.report = REPORT
    assert estimated(context) == pytest.approx((256, 256))
    for change, more in (({"optimizer_seconds": 0.5}, 500), ({"compile_seconds": 30}, 30)):
        context.report = replace(REPORT, **change)
        assert estimated(context) == pytest.approx((256 + more, 256 + more))

    # 4 and the last, of 3,000 tokens that are there, at a third of the work.
    context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=240, TRAIN_VAL_TOKENS="1M")
    context.report, context.val_tokens = REPORT, 3000
    assert max(estimated(context)) == pytest.approx(256 + 5 * 3000 / 1000 / 3)

    # 3 times, after 500 steps were done.
    context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0, TRAIN_HELLASWAG_EVERY=200)
    context.report, context.steps_completed = REPORT, 500
    assert max(estimated(context)) == pytest.approx(128 + 3 * 10_042 * 320 / 1000 / 3)
    context.questions = 100
    assert max(estimated(context)) == pytest.approx(128 + 3 * 100 * 320 / 1000 / 3)


def test_several_processes_divide_the_work(new_context: NewContext) -> None:
    context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0)
    context.report = replace(REPORT, processes=4)
    assert max(estimated(context)) == pytest.approx(64)
    duration = next(check_duration(context))
    assert "4 processes as fast as this one: 4,000 tokens/s" in duration.found


def test_a_time_limit_ends_a_run_that_would_take_longer(new_context: NewContext) -> None:
    for hours, limit, cost in (
        (0.02, "; TRAIN_MAX_HOURS=0.02 ends the run after about 281 steps", "0.72 at"),
        (1, "not compiled", "2.56 at"),
    ):
        context = new_context(
            TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0, TRAIN_MAX_HOURS=hours, TRAIN_PRICE_PER_HOUR=36
        )
        context.report, context.steps_completed = REPORT, 0
        duration, costs = check_duration(context)
        assert duration.found.endswith(limit)
        assert costs.found.startswith(cost)

    # Continued, the run has what it has not used yet.
    context = new_context(
        TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0, TRAIN_MAX_HOURS=1, TRAIN_PRICE_PER_HOUR=36
    )
    context.report, context.elapsed_seconds = REPORT, 3600 - 64
    duration, costs = check_duration(context)
    assert duration.found.endswith("; TRAIN_MAX_HOURS=1 ends the run after about 250 steps")
    assert costs.found.startswith("0.64 at")

    context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0)
    context.report, context.planned_steps, context.steps_completed = REPORT, 400, 300
    assert context.remaining_steps == 100
    assert max(estimated(context)) == pytest.approx(25.6)


def test_only_remaining_steps_count(new_context: NewContext) -> None:
    context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0)
    context.report, context.steps_completed = REPORT, 750
    assert max(estimated(context)) == pytest.approx(64)
    context.steps_completed = 1000
    (row,) = check_duration(context)
    assert (row.status, row.found) == ("pass", "nothing is left to do")


def test_without_a_measured_step_the_estimate_is_a_range(new_context: NewContext) -> None:
    context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0, TRAIN_PRICE_PER_HOUR=36)
    context.report = replace(REPORT, micro_batch_tokens=0)
    least, most = estimated(context)
    at_the_peak = 256_000 * 1e8 / 1e12
    assert at_the_peak < least < 2 * at_the_peak
    assert most == pytest.approx(4 * at_the_peak)
    duration, cost = check_duration(context)
    assert "no step could be measured" in duration.found
    assert cost.found.startswith("0.43 to 1.02 at 36 an hour")


def test_without_any_measurement_there_is_no_estimate(new_context: NewContext) -> None:
    context = new_context()
    for report in (None, DeviceReport("cpu", 1)):
        context.report = report
        assert [row.status for row in check_duration(context)] == ["skip"]


def test_an_estimate_without_the_compiler_that_was_wanted_is_a_warning(
    new_context: NewContext,
) -> None:
    found = []
    for compiles, seconds in (("true", 30.0), ("true", 0.0), ("false", 0.0)):
        context = new_context(TRAIN_MAX_STEPS=1000, TRAIN_COMPILE=compiles)
        context.report = replace(REPORT, compile_seconds=seconds)
        found.append(next(check_duration(context)))
    assert [row.status for row in found] == ["pass", "warn", "pass"]
    assert found[1].found.endswith("not compiled")
    assert found[1].fix == "make compiling work, see above: compiled code is faster"


def test_slow_steps_that_are_seldom_saved_have_a_row(new_context: NewContext) -> None:
    """A step takes half an hour: of 256 tokens, at 256 / 1800 tokens/s."""
    context = new_context(
        TRAIN_MAX_STEPS=40, TRAIN_VAL_EVERY=0, TRAIN_CHECKPOINT_EVERY=20, TRAIN_MAX_HOURS=5
    )
    context.report = replace(REPORT, micro_batch_seconds=1800)
    limit, interval = (row for row in check_duration(context) if row.check == "plan")
    assert (limit.status, limit.found, limit.fix) == (
        "warn",
        "TRAIN_MAX_HOURS=5 is enough for at most 10 steps here",
        "set TRAIN_MAX_HOURS=10 or more, or a smaller TRAIN_TOKENS_PER_STEP",
    )
    assert interval.found.startswith("checkpoints are at least 5.0 hours apart, and if the")
    assert interval.fix == "set TRAIN_CHECKPOINT_EVERY=1"
