import pytest

from app.runs.metrics import PAUSES, PauseTimer, StepRecord, total_seconds
from app.settings.settings import Settings
from app.train.main import train
from tests.train.conftest import TinySettings
from tests.train.test_trainer import metrics_of


def test_what_passes_is_added_up_by_kind_and_told_once() -> None:
    pauses = PauseTimer()
    for kind in ("val_ms", "val_ms", "save_ms"):
        with pauses.measuring(kind):
            pass
    with pytest.raises(ZeroDivisionError), pauses.measuring("sample_ms"):
        raise ZeroDivisionError
    record = StepRecord(0, 1, 5.0, val_ms=1000.0).plus(pauses.take(), val_loss=4.5)
    assert all(getattr(record, kind) > 0 for kind in PAUSES)
    assert record.val_ms is not None
    assert record.val_ms > 1000
    assert record.val_loss == 4.5
    assert pauses.take() == {}


def test_seconds_are_those_of_steps_and_of_what_is_between_them() -> None:
    records = [
        StepRecord(0, 1, 5.0, step_ms=1500.0, setup_ms=500.0, mfu=3),
        StepRecord(1, 2, 5.0, val_ms=1000),
    ]
    assert total_seconds(records) == 3
    assert total_seconds([]) == 0


def kinds_of(settings: Settings) -> list[set[str]]:
    return [set(PAUSES) & record.keys() for record in metrics_of(settings)]


def test_a_run_tells_what_passed_before_each_line(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=6))
    settings = tiny(TRAIN_MAX_STEPS=10)
    train(settings)
    # Checkpoints after 4, 6, 8 steps, held-out losses and samples after 5 and at the end.
    assert kinds_of(settings) == [
        *({"setup_ms"}, set(), set(), set(), {"save_ms", "val_ms"}, {"sample_ms", "val_ms"}),
        *({"setup_ms"}, set(), {"save_ms"}, {"val_ms"}),
    ]
    assert all(record["data_ms"] <= record["step_ms"] for record in metrics_of(settings))
