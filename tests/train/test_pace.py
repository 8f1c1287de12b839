"""What is left of a run, from the measurements of its steps and pauses."""

from app.runs.metrics import StepRecord
from app.settings.train import TrainSettings
from app.train.pace import Pace

CFG = TrainSettings.model_validate(
    {"val_every": 10, "sample_every": 0, "checkpoint_every": 4, "tokens_per_step": 1024}
)


def test_pauses_come_at_their_intervals_and_after_the_last_step() -> None:
    pace = Pace(CFG, held_out_tokens=2048)
    pace.add(2.0, {"save_ms": 500.0, "sample_ms": 9000.0})
    pace.add(4.0, {"val_ms": 7000.0})
    # After steps 12, 16, 20 and 22 it saves, after 20 and 22 it evaluates.
    assert pace.seconds_left(12, 22) == 10 * 3.0 + 4 * 0.5 + 2 * 7.0


def test_a_held_out_loss_that_is_not_measured_yet_takes_a_third_of_its_tokens_training() -> None:
    pace = Pace(CFG, held_out_tokens=3 * 1024)
    pace.add(2.0, {})
    assert pace.seconds_left(9, 10) == 2.0 + 2.0
    assert Pace(CFG, held_out_tokens=0).seconds_left(9, 10) == 0.0


def test_an_earlier_start_is_measured_without_the_step_that_compiled() -> None:
    def record(step: int, step_ms: float, **pauses: float) -> StepRecord:
        one = StepRecord(step=step, tokens=1024, train_loss=5.0, step_ms=step_ms)
        return one.plus(pauses)

    first = record(0, 60_000.0, setup_ms=5000.0)
    others = [record(step, 2000.0) for step in (1, 2)]
    pace = Pace(CFG, 0).with_earlier([first, *others, record(3, 2000.0, save_ms=1000.0)])
    assert pace.measured_steps == 3
    assert pace.seconds_left(4, 8) == 4 * 2.0 + 2 * 1.0
