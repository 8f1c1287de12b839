from typing import Literal

import pytest

from app.settings.train import TrainSettings
from app.train.lr_schedule import LRSchedule


def learning_rates(
    decay: Literal["constant", "cosine", "linear"], *, warmup: int, steps: int, ratio: float
) -> list[float]:
    schedule = LRSchedule(1.0, decay, warmup, steps, ratio)
    return [schedule.learning_rate(step) for step in range(steps)]


def test_warmup_begins_above_zero_and_ends_at_the_peak() -> None:
    assert learning_rates("constant", warmup=4, steps=6, ratio=0) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear_decay_ends_at_the_minimum() -> None:
    expected = [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert learning_rates("linear", warmup=2, steps=6, ratio=0.2) == pytest.approx(expected)


def test_cosine_decay_is_half_way_in_the_middle_and_ends_at_the_minimum() -> None:
    rates = learning_rates("cosine", warmup=0, steps=4, ratio=0.0)
    assert rates == pytest.approx([0.8535534, 0.5, 0.1464466, 0.0])
    assert learning_rates("cosine", warmup=3, steps=9, ratio=0.1)[-1] == pytest.approx(0.1)


def test_a_constant_rate_without_warmup_is_the_peak_from_the_first_step() -> None:
    assert learning_rates("constant", warmup=0, steps=2, ratio=0.1) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("warmup", "cooldown", "expected"),
    (
        (0, 0.5, [1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (2, 0.25, [0.5, 1, 1, 1, 1, 1, 0.6, 0.2]),
        (0, 0.0, [1] * 8),
        (4, 1.0, [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2]),
    ),
)
def test_wsd_is_constant_up_to_the_cool_down(
    warmup: int, cooldown: float, expected: list[float]
) -> None:
    schedule = LRSchedule(1.0, "wsd", warmup, 8, 0.2, cooldown)
    assert [schedule.learning_rate(step) for step in range(8)] == pytest.approx(expected)
    first = next((step for step in range(warmup, 8) if expected[step] < 1), 8)
    assert schedule.decay_start == schedule.cooldown_start == first


def test_only_wsd_has_a_cooldown() -> None:
    for decay in ("constant", "cosine", "linear"):
        assert LRSchedule(1.0, decay, 2, 8, 0.2, 0.5).cooldown_start is None


def test_a_run_that_continues_to_more_steps_keeps_its_automatic_warmup() -> None:
    cfg = TrainSettings(warmup_steps="auto", max_steps=20_000)
    assert LRSchedule.from_settings(cfg).warmup_steps == 200
    assert LRSchedule.from_settings(cfg, 40).warmup_steps == 40
    assert LRSchedule.from_settings(cfg, 0).warmup_steps == 0
    cfg = TrainSettings(warmup_steps=7, max_steps=20_000)
    assert LRSchedule.from_settings(cfg, 40).warmup_steps == 7


@pytest.mark.parametrize("decay", ("linear", "cosine", "wsd"))
@pytest.mark.parametrize("plans", ([(50, 1000), (250, 900), (880, 890)], [(5, 40), (38, 39)]))
def test_a_plan_of_fewer_steps_never_lifts_the_rate(
    decay: Literal["linear", "cosine", "wsd"], plans: list[tuple[int, int]]
) -> None:
    cfg = TrainSettings(
        learning_rate=1.0, lr_schedule=decay, warmup_steps="auto", max_steps=10**6, cooldown=0.4
    )
    (done, steps), *later = plans
    schedule = LRSchedule.from_settings(cfg).replanned(cfg, done, steps)
    assert schedule.warmup_steps == done
    for done, steps in later:
        before, schedule = schedule, schedule.replanned(cfg, done, steps)
        assert schedule.warmup_steps == before.warmup_steps
        assert schedule.learning_rate(done) <= before.learning_rate(done)


def test_a_plan_keeps_a_warmup_that_is_set() -> None:
    cfg = TrainSettings(warmup_steps=30, max_steps=10**6)
    assert LRSchedule.from_settings(cfg).replanned(cfg, 10, 500).warmup_steps == 30


@pytest.mark.parametrize(
    ("warmup_steps", "max_steps", "expected"),
    (("auto", 1000, 10), ("auto", 38, 0), ("auto", 150, 2), (7, 1000, 7), (0, 1000, 0)),
)
def test_an_automatic_warmup_is_one_percent_of_the_steps(
    warmup_steps: int | Literal["auto"], max_steps: int, expected: int
) -> None:
    cfg = TrainSettings(
        learning_rate=0.5,
        lr_schedule="linear",
        warmup_steps=warmup_steps,
        max_steps=max_steps,
        min_lr_ratio=0.25,
    )
    assert LRSchedule.from_settings(cfg) == LRSchedule(
        0.5, "linear", expected, max_steps, 0.25, cfg.cooldown
    )
