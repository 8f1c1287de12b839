"""metrics.jsonl: what it holds, what a new start keeps of it, and damaged lines."""

import json
import math
from pathlib import Path

import pytest

from app.errors import UserError
from app.runs.metrics import (
    PAUSES,
    MetricsLog,
    PauseTimer,
    StepRecord,
    read_metrics,
    total_seconds,
)
from tests.test_files import file_size_limit

COMPLETE = '{"step": 0, "tokens": 32, "train_loss": 4.5, "mfu": null}\n'


def line(step: int) -> str:
    return f'{{"step": {step}, "tokens": {32 * (step + 1)}, "train_loss": 4.5, "mfu": null}}\n'


def test_a_record_has_the_measured_fields_and_always_mfu() -> None:
    assert StepRecord(0, 32, 4.5).to_json() == json.loads(COMPLETE)
    assert StepRecord(0, 32, 4.5, mfu=0.5, val_loss=4.0).to_json() == {
        "step": 0,
        "tokens": 32,
        "train_loss": 4.5,
        "mfu": 0.5,
        "val_loss": 4.0,
    }


def test_pauses_are_added_up_by_kind_and_taken_once() -> None:
    pauses = PauseTimer()
    for kind in ("val_ms", "val_ms", "hellaswag_ms", "save_ms"):
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


def test_total_seconds_are_those_of_steps_and_pauses() -> None:
    records = [
        StepRecord(0, 1, 5.0, step_ms=1500.0, setup_ms=500.0, mfu=3),
        StepRecord(1, 2, 5.0, val_ms=1000),
    ]
    assert total_seconds(records) == 3
    assert total_seconds([]) == 0


def test_records_are_read_as_they_were_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [StepRecord(step, 32 * step, 4.5 / (step + 1), val_ms=1.5) for step in range(3)]
    log = MetricsLog(path, 0)
    for record in records:
        log.append(record)
    assert log.sync() == 3
    assert read_metrics(path) == records
    assert MetricsLog(path, 3).records == records


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(0) + line(1)[:20])
    assert [record.step for record in read_metrics(path)] == [0]
    assert [record.step for record in MetricsLog(path, 1).records] == [0]
    assert path.read_text() == line(0)


def test_only_optional_fields_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "tokens": 32, "train_loss": 4}\n')
    assert read_metrics(path) == [StepRecord(0, 32, 4.0)]
    path.write_text('{"step": 0, "train_loss": 4}\n')
    with pytest.raises(UserError, match="line 1 is not the JSON object of a step: tokens Field re"):
        read_metrics(path)


def test_a_cut_keeps_lines_unchanged_with_keys_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    own = '{"train_loss":  4.50, "step": 0, "energy_joules": [1, {"a": "ä"}], "tokens": 32}\n'
    path.write_text(own + line(1) + line(2) + line(3)[:9])
    log = MetricsLog(path, 2)
    assert path.read_text() == own + line(1)
    log.append(StepRecord(2, 96, 4.5))
    assert path.read_text() == own + line(1) + line(2)
    assert log.sync() == 3


@pytest.mark.parametrize(
    "content", ("", line(0), line(0) + line(2), line(0) * 2, line(1) + line(0))
)
def test_missing_or_repeated_lines_are_refused_and_stay(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="does not have a line for each of the 2 steps"):
        MetricsLog(path, 2)
    assert path.read_text() == content


def test_a_missing_file_of_a_run_with_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing, and the run has 2 steps"):
        MetricsLog(tmp_path / "metrics.jsonl", 2)
    assert MetricsLog(tmp_path / "metrics.jsonl", 0).records == []


@pytest.mark.parametrize(
    ("damaged", "fault"),
    (
        ('{"step": 1, "tokens": 64, "train_loss": "4.5"}', "train_loss"),
        ('{"step": "1", "tokens": 64, "train_loss": 4.5}', "step"),
        ('{"step": 1.5, "tokens": 64, "train_loss": 4.5}', "step"),
        (f'{{"step": {"9" * 400}, "tokens": 64, "train_loss": 4.5}}', "step"),
        ('{"step": 1, "tokens": 64, "train_loss": null}', "train_loss"),
        ('{"step": 1, "tokens": 64, "train_loss": 4.5, "lr": "fast"}', "lr"),
        ("[1, 64, 4.5]", ""),
        ("4.5", ""),
        ("", "Invalid JSON"),
        ('{"step": 1, "tokens": 64, "train_l', "Invalid JSON"),
        ("step 1", "Invalid JSON"),
        ("\x00\x00", "Invalid JSON"),
    ),
)
def test_a_damaged_line_is_named_and_stays(tmp_path: Path, damaged: str, fault: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = f"{line(0)}{damaged}\n{line(2)}"
    path.write_text(content)
    problem = rf"metrics\.jsonl, line 2 is not the JSON object of a step: {fault}"
    with pytest.raises(UserError, match=problem):
        read_metrics(path)
    with pytest.raises(UserError, match=problem):
        MetricsLog(path, 3)
    assert path.read_text() == content


def test_a_value_that_is_not_finite_is_read_but_never_written(tmp_path: Path) -> None:
    """The report shows runs of other programs, too."""
    (tmp_path / "other.jsonl").write_text('{"step": 0, "tokens": 32, "train_loss": NaN}\n')
    (record,) = read_metrics(tmp_path / "other.jsonl")
    assert math.isnan(record.train_loss)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="JSON"):
        log.append(StepRecord(0, 32, float("nan")))


def test_a_line_that_the_disk_refuses_is_written_once_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append(StepRecord(0, 32, 4.5))
    with file_size_limit(path.stat().st_size + 10):
        for step in (1, 2):
            with pytest.raises(OSError, match="File too large") as failure:
                log.append(StepRecord(step, 32 * (step + 1), 4.5))
            assert failure.value.filename == str(path)
        with pytest.raises(OSError, match="File too large"):
            log.sync()
        assert path.read_text() == line(0)
    log.append(StepRecord(3, 128, 4.5))
    assert path.read_text() == "".join(map(line, range(4)))
    assert log.sync() == 4
