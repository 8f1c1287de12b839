"""The steps that a time limit plans, with simulated clocks and in real runs."""

import json
import random
import signal
from collections.abc import Callable

import pytest

from app.runs.checkpoints import latest_checkpoint
from app.runs.folder import RunFolder
from app.settings.settings import Settings
from app.settings.train import TrainSettings
from app.train.main import train
from app.train.pace import Pace
from app.train.start import open_training_data, plan_start
from app.train.time_limit import TimeLimit
from tests.train.conftest import TinySettings
from tests.train.processes import Start, measured


def simulate(
    cfg: TrainSettings,
    step_seconds: Callable[[int], float],
    *,
    setup: float = 10.0,
    pauses: dict[str, float] | None = None,
    planned: int | None = None,
) -> tuple[int, float, list[int]]:
    """Return the steps, the seconds until the end has only begun, and the plans of a run.

    Args:
        pauses: seconds of each kind of pause; all have the interval val_every.
    """
    pace = Pace(cfg, cfg.val_tokens if pauses else 0)
    limit = TimeLimit(cfg, planned, pace)
    elapsed, done, steps, plans = setup, 0, planned or cfg.max_steps, list[int]()
    last: dict[str, float] = {}
    while done < steps:
        elapsed += step_seconds(done)
        done += 1
        if done > 1:
            pace.add(step_seconds(done - 1), last)
        new = limit.plan(done, elapsed)
        if new is not None:
            steps = new
            plans.append(new)
        if pauses and (done % cfg.val_every == 0 or done >= steps):
            elapsed += sum(pauses.values())
            last = {kind: 1000 * seconds for kind, seconds in pauses.items()}
    return done, elapsed, plans


def limited(hours: float, **settings: object) -> TrainSettings:
    values = {"max_steps": 10**6, "checkpoint_every": 0, "sample_every": 0, "val_every": 0}
    return TrainSettings.model_validate(values | {"max_hours": hours} | settings)


def test_a_steady_run_uses_the_time_that_the_end_does_not_need() -> None:
    steps, seconds, plans = simulate(limited(1), lambda step: 0.5 if step else 60.0)
    assert 3600 * 0.96 - 38 < seconds <= 3600 - 38
    assert plans[0] == pytest.approx(steps, rel=0.01)
    assert len(plans) <= 2


def test_pauses_are_part_of_the_plan() -> None:
    cfg = limited(0.5, val_every=100, sample_every=100)
    pauses = {"val_ms": 10.0, "sample_ms": 2.0}
    steps, seconds, _ = simulate(cfg, lambda _: 0.2, pauses=pauses)
    assert 1800 * 0.96 - 20 - 24 < seconds <= 1800 - 20
    assert steps == pytest.approx(1770 / (0.2 + 0.12), rel=0.04)


def test_slow_first_steps_are_corrected_once() -> None:
    steps, seconds, plans = simulate(limited(1), lambda step: 5.0 if step < 30 else 0.5)
    assert 3600 * 0.96 - 38 < seconds <= 3600 - 38
    assert plans[0] < steps == plans[-1]
    assert len(plans) == 2


def test_a_machine_that_slows_down_ends_in_time_with_fewer_steps() -> None:
    even, *_ = simulate(limited(1), lambda _: 0.5)
    steps, seconds, plans = simulate(limited(1), lambda step: 0.5 if step < 5000 else 5.0)
    assert seconds <= 3600 - 38 + 5.0
    assert steps < even
    assert plans[1:] == sorted(plans[1:], reverse=True)


def test_noise_does_not_change_the_plan_again_and_again() -> None:
    noise = random.Random(0)
    _, seconds, plans = simulate(limited(1), lambda _: 0.5 * noise.uniform(0.9, 1.1))
    assert 3600 * 0.95 - 38 < seconds <= 3600 - 38
    assert len(plans) <= 4


def test_a_run_that_is_short_enough_has_all_its_steps() -> None:
    steps, _, plans = simulate(limited(1, max_steps=50), lambda _: 2.0)
    assert steps == 50
    assert plans == [50]


@pytest.mark.parametrize("first_step", (30.0, 500.0))
def test_a_first_step_that_takes_it_all_is_the_only_one(first_step: float) -> None:
    steps, _, plans = simulate(limited(1 / 3600 * 40), lambda _: first_step)
    assert steps == 1
    assert plans == [1]


def test_a_first_step_that_compiles_says_nothing_about_the_held_out_loss() -> None:
    """Its 16 steps' worth of tokens would take 107 s at the first step's speed."""
    cfg = limited(80 / 3600, val_every=100, val_tokens=16 * 524_288)
    pauses = {"val_ms": 0.25 * 16 / 3}
    steps, seconds, _ = simulate(cfg, lambda step: 0.25 if step else 20.0, pauses=pauses)
    assert 170 < steps < 185
    assert seconds < 80


def test_without_a_plan_there_is_no_step_that_would_end_too_late() -> None:
    steps, seconds, _ = simulate(limited(120 / 3600), lambda step: 60.0 if step == 0 else 20.0)
    assert steps == 3
    assert seconds == 110.0


def test_a_continued_run_keeps_the_plan_although_it_is_faster() -> None:
    steps, _, plans = simulate(limited(1), lambda _: 0.1, planned=700)
    assert steps == 700
    assert plans == []


def test_a_continued_run_that_compiles_again_keeps_the_plan() -> None:
    steps, _, plans = simulate(limited(3), lambda step: 1.0 if step else 60.0, planned=10_000)
    assert steps == 10_000
    assert plans == []


def test_a_continued_run_without_time_ends_after_its_first_step() -> None:
    steps, _, plans = simulate(limited(1), lambda _: 0.1, setup=3590.0, planned=700)
    assert steps == 1
    assert plans == [1]


def state_of(settings: Settings) -> dict[str, object]:
    state = latest_checkpoint(settings.run_dir, None, (), "").state
    return {"step": state.step, "planned": state.planned_steps}


def test_a_run_without_time_saves_its_first_step_and_is_finished_until_it_gets_more(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    none = tiny(TRAIN_MAX_HOURS=1e-6)
    train(none)
    assert "TRAIN_MAX_HOURS=1e-06 is enough for 1 of 10 steps\n" in capsys.readouterr().out
    assert state_of(none) == {"step": 1, "planned": 1}
    facts = json.loads((none.run_dir / "settings.json").read_text())
    assert facts["planned_steps"] == 1

    run = RunFolder(none.run_dir)
    assert plan_start(none, open_training_data(none), run) is None
    more = tiny(TRAIN_MAX_HOURS=1000)
    train(more)
    assert state_of(more)["step"] == 10
    without = tiny(TRAIN_MAX_STEPS=12)
    train(without)
    assert state_of(without) == {"step": 12, "planned": None}


@pytest.mark.slow
@pytest.mark.processes
def test_all_ranks_have_the_first_ones_plan(start: Start) -> None:
    process = start(TRAIN_MAX_HOURS=1e-6, TRAIN_PROCESSES=2)
    code, output = process.end()
    assert code == 0, output
    assert len(measured(process.run_dir)) == 1
    assert "1 step took " in output


@pytest.mark.slow
@pytest.mark.processes
def test_a_limited_run_that_is_stopped_keeps_its_plan_and_ends_cooled_down(start: Start) -> None:
    changes = {
        "TRAIN_MAX_HOURS": 40 / 3600,
        "TRAIN_MAX_STEPS": 10**6,
        "TRAIN_LR_SCHEDULE": "linear",
        "TRAIN_WARMUP_STEPS": "auto",
        "TRAIN_MIN_LR_RATIO": 0.1,
        "TRAIN_LEARNING_RATE": 1e-3,
        "TRAIN_CHECKPOINT_EVERY": 100,
        "TRAIN_VAL_EVERY": 100,
        "TRAIN_SAMPLE_EVERY": 0,
    }
    stopped = start(**changes)
    stopped.signal_at("TRAIN_MAX_HOURS=", signal.SIGTERM)
    code, output = stopped.end()
    assert code == 143, output
    facts = json.loads((stopped.run_dir / "settings.json").read_text())

    code, output = start(**changes).end()
    assert code == 0, output
    state = latest_checkpoint(stopped.run_dir, None, (), "").state
    assert 1 < state.step == state.planned_steps <= facts["planned_steps"] < 10**6
    assert f"{state.step:,} steps took " in output
    assert "of 40 s (TRAIN_MAX_HOURS=0.0111111)" in output
    records = measured(stopped.run_dir)
    assert len(records) == state.step
    assert records[-1]["lr"] == pytest.approx(1e-4)
    assert "val_loss" in records[-1]
