from dataclasses import replace

import pytest

from app.tools.doctor.case import Case, Trial
from app.tools.doctor.estimate import check_duration, estimate
from tests.tools.doctor.conftest import NewCase

# 1,000 tokens in a second, and nothing else takes time.
TRIAL = Trial(
    "cpu", 1, matmul_flops=1e12, model_flops_per_token=1e8,
    micro_batch_tokens=256, micro_batch_seconds=0.256,
)  # fmt: skip


def estimated(case: Case) -> tuple[float, float]:
    found = estimate(case)
    assert found is not None
    return found.seconds


def test_time_is_that_of_tokens_updates_evaluations_and_the_compiler(new_case: NewCase) -> None:
    case = new_case(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0)
    case.trial = TRIAL
    assert estimated(case) == pytest.approx((256, 256))
    for change, more in (({"optimizer_seconds": 0.5}, 500), ({"compile_seconds": 30}, 30)):
        case.trial = replace(TRIAL, **change)
        assert estimated(case) == pytest.approx((256 + more, 256 + more))

    # 4 and the last, of 3,000 tokens that are there, at a third of the work.
    case = new_case(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=240, TRAIN_VAL_TOKENS="1M")
    case.trial, case.val_tokens = TRIAL, 3000
    assert max(estimated(case)) == pytest.approx(256 + 5 * 3000 / 1000 / 3)


def test_several_processes_share_the_work(new_case: NewCase) -> None:
    case = new_case(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0)
    case.trial = replace(TRIAL, processes=4)
    assert max(estimated(case)) == pytest.approx(64)
    duration = next(check_duration(case))
    assert "4 processes as fast as this one: 4,000 tokens/s" in duration.found


def test_only_what_is_left_counts(new_case: NewCase) -> None:
    case = new_case(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0)
    case.trial, case.steps_done = TRIAL, 750
    assert max(estimated(case)) == pytest.approx(64)
    case.steps_done = 1000
    (row,) = check_duration(case)
    assert (row.status, row.found) == ("pass", "nothing is left to do")


def test_without_a_measured_step_a_range_is_told(new_case: NewCase) -> None:
    case = new_case(TRAIN_MAX_STEPS=1000, TRAIN_VAL_EVERY=0, TRAIN_PRICE_PER_HOUR=36)
    case.trial = replace(TRIAL, micro_batch_tokens=0)
    least, most = estimated(case)
    at_the_peak = 256_000 * 1e8 / 1e12
    assert at_the_peak < least < 2 * at_the_peak
    assert most == pytest.approx(4 * at_the_peak)
    duration, cost = check_duration(case)
    assert "no step could be measured" in duration.found
    assert cost.found.startswith("0.43 to 1.02 at 36 an hour")


def test_without_any_measurement_nothing_is_told(new_case: NewCase) -> None:
    case = new_case()
    for trial in (None, Trial("cpu", 1)):
        case.trial = trial
        assert [row.status for row in check_duration(case)] == ["skip"]
