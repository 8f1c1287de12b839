"""The logger of a run: settings, metrics and samples, cut back to a checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import UserError
from app.runs.checkpoint import Checkpoint
from app.runs.folder import RunFolder
from app.runs.metrics import StepRecord, read_metrics
from app.runs.run_logger import RunLogger
from app.runs.samples import read_samples
from tests.test_files import file_size_limit
from tests.train.tiny_model import checkpoint_state


def record(step: int) -> StepRecord:
    return StepRecord(step, 32 * (step + 1), 4.5, step_ms=1000.0)


def checkpoint(run: RunFolder, metrics_lines: int, samples_bytes: int) -> Checkpoint:
    state = replace(
        checkpoint_state(metrics_lines), metrics_lines=metrics_lines, samples_bytes=samples_bytes
    )
    return Checkpoint(run.checkpoints / "step", state)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def steps(run: RunFolder) -> list[int]:
    return [record.step for record in read_metrics(run.metrics)]


def test_a_continued_run_has_each_step_and_sample_once(run: RunFolder) -> None:
    log = RunLogger(run, None, {"version": 1}, print)
    for step in range(2):
        log.add_step(record(step))
    log.add_samples(2, ["second"])
    lengths = log.sync()
    log.add_step(record(2))
    log.add_samples(3, ["third"])

    log = RunLogger(run, checkpoint(run, *lengths), {"version": 2}, print)
    assert steps(run) == [0, 1]
    assert log.earlier_seconds == 2.0
    assert json.loads(run.settings.read_text()) == {"version": 2}
    log.add_step(record(2))
    log.add_samples(3, ["another third"])
    assert steps(run) == [0, 1, 2]
    assert read_samples(run.samples) == [(2, ["second"]), (3, ["another third"])]
    assert log.sync() == (3, run.samples.stat().st_size)


def test_metrics_of_a_run_without_a_checkpoint_are_kept_aside(run: RunFolder) -> None:
    for start in (1, 2):
        RunLogger(run, None, {}, print).add_step(record(0))
        if start == 2:
            assert (run.path / "metrics.before-1.jsonl").read_bytes() == run.metrics.read_bytes()
    RunLogger(run, None, {}, print)
    names = sorted(path.name for path in run.path.glob("metrics*"))
    assert names == ["metrics.before-1.jsonl", "metrics.before-2.jsonl", "metrics.jsonl"]
    # An empty file is not worth keeping.
    RunLogger(run, None, {}, print)
    assert len(list(run.path.glob("metrics*"))) == 3


def test_damaged_metrics_are_refused_before_anything_changes(run: RunFolder) -> None:
    RunLogger(run, None, {"version": 1}, print).add_samples(1, ["text"])
    run.metrics.write_text("damaged\n")
    before = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="line 1 is not the JSON object of a step"):
        RunLogger(run, checkpoint(run, 1, 0), {"version": 2}, print)
    assert {path: path.read_bytes() for path in before} == before


def test_what_the_disk_refuses_is_reported_and_written_once_there_is_room(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    log = RunLogger(run, None, {}, lines.append)
    log.add_step(record(0))
    log.add_samples(1, ["first"])
    largest = max(file.stat().st_size for file in (run.metrics, run.samples))
    with file_size_limit(largest + 5):
        for step in (1, 2):
            log.add_step(record(step))
            log.add_samples(step + 1, [f"text {step}" * 20])
        with pytest.raises(OSError, match="File too large"):
            log.sync()
    assert "training continues without TensorBoard events" in capsys.readouterr().err
    assert steps(run) == [0]
    assert [line.partition(":")[0] for line in lines] == ["warning"] * 4
    assert all("the entry is kept and will be written once there is room" in line for line in lines)
    assert log.sync() == (3, run.samples.stat().st_size)
    assert steps(run) == [0, 1, 2]
    assert [step for step, _ in read_samples(run.samples)] == [1, 2, 3]


@pytest.mark.parametrize("kind", ("trackio", "wandb"))
def test_a_tracker_that_is_not_installed_is_one_warning(run: RunFolder, kind: str) -> None:
    lines: list[str] = []
    log = RunLogger(run, None, {}, lines.append, kind)
    for step in range(3):
        log.add_step(record(step))
    log.close()
    assert lines == [
        f"warning: training continues without a tracker: this needs the Python package {kind}, "
        f"which is not installed; pip install {kind}"
    ]
    assert steps(run) == [0, 1, 2]
