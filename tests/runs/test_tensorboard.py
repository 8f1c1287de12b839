"""Real runs, whose events TensorBoard's own reader reads back."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from app.runs.metrics import StepRecord, read_metrics, total_seconds
from app.runs.samples import read_samples
from app.runs.tensorboard import EventLog
from app.settings.settings import Settings
from app.train.main import train
from tests.train.conftest import TinySettings
from tests.train.processes import Process
from tests.train.test_trainer import metrics_of

Points = dict[str, list[tuple[int, float]]]
CURVES = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "optim/grad_norm": "grad_norm",
    "optim/lr": "lr",
    "perf/memory_bytes": "memory_bytes",
    "perf/step_ms": "step_ms",
    "perf/tokens_per_second": "tokens_per_second",
}


def read_events(run_dir: Path) -> EventAccumulator:
    (file,) = (run_dir / "tensorboard").iterdir()
    reader = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
    return reader.Reload()


def texts_of(settings: Settings, tag: str) -> dict[int, list[str]]:
    """Return the Markdown of TensorBoard's text page by step."""
    reader = read_events(settings.run_dir)
    metadata = reader.SummaryMetadata(tag)
    assert metadata.plugin_data.plugin_name == "text"
    return {
        event.step: [text.decode() for text in tensor_util.make_ndarray(event.tensor_proto)]
        for event in reader.Tensors(tag)
    }


def samples_of(settings: Settings) -> dict[int, list[str]]:
    """Return the texts of samples.txt as Markdown code, by the last completed step."""
    return {
        done - 1: ["".join(f"    {line}\n" for line in text.split("\n")) for text in texts]
        for done, texts in read_samples(settings.run_dir / "samples.txt")
    }


def events_of(settings: Settings) -> Points:
    reader = read_events(settings.run_dir)
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def expected_of(settings: Settings) -> Points:
    """Return the points of metrics.jsonl, in float32 as TensorBoard's scalars are."""
    records = metrics_of(settings)
    columns = {
        name: [
            (record["step"], float(np.float32(record[column])))
            for record in records
            if record.get(column) is not None
        ]
        for name, column in CURVES.items()
    }
    return {name: points for name, points in columns.items() if points}


def test_events_are_the_lines_of_the_metrics(tiny: TinySettings) -> None:
    settings = tiny()
    train(settings)
    events = events_of(settings)
    assert events == expected_of(settings)
    assert events.keys() == CURVES.keys()
    assert [step for step, _ in events["loss/train"]] == list(range(10))
    assert [step for step, _ in events["loss/val"]] == [4, 9]


def test_a_continued_run_has_one_point_a_step(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=4))
    settings = tiny()
    train(settings)
    assert events_of(settings) == expected_of(settings)
    assert len(events_of(settings)["loss/train"]) == 10


def test_samples_are_texts_and_those_before_a_start_are_written_again(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=7, SAMPLE_NUM_SAMPLES=2))
    assert samples_of(tiny()).keys() == {4, 6}
    assert texts_of(tiny(), "samples") == samples_of(tiny())
    train(tiny(SAMPLE_NUM_SAMPLES=2))
    assert samples_of(tiny()).keys() == {4, 6, 9}
    assert texts_of(tiny(), "samples") == samples_of(tiny())
    assert all(len(texts) == 2 for texts in samples_of(tiny()).values())


def test_settings_are_a_table_and_hyperparameters(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_MAX_STEPS=3)
    train(settings)
    ((table,),) = texts_of(settings, "settings").values()
    for line in (
        *("setting|value", "train.learning_rate|`0.01`", "train.betas|`[0.9, 0.95]`"),
        *("model.num_layers|`2`", "dataset.val_tokens|", "versions.torch|"),
    ):
        assert any(row.startswith(line) for row in table.split("\n")), line
    metadata = read_events(settings.run_dir).SummaryMetadata("_hparams_/session_start_info")
    assert metadata.plugin_data.plugin_name == "hparams"
    hyperparameters = HParamsPluginData.FromString(
        metadata.plugin_data.content
    ).session_start_info.hparams
    assert hyperparameters["train.learning_rate"].number_value == 0.01
    assert hyperparameters["train.shuffle"].bool_value is True
    assert hyperparameters["train.optimizer"].string_value == settings.train.optimizer
    assert {name.partition(".")[0] for name in hyperparameters} == {"train", "model"}


def test_any_text_is_an_event(tmp_path: Path) -> None:
    texts = ["", "a|b `c` <b> \x00\x07\ud800", "東京\r\n\n\ttab", "    # no heading"]
    log = EventLog(tmp_path / "tensorboard", [], [(1, texts)], {"settings": {"a|b": "`x`\n|y"}})
    log.append_samples(2, texts)
    (first, second) = read_events(tmp_path).Tensors("samples")
    one, two = (tensor_util.make_ndarray(event.tensor_proto).tolist() for event in (first, second))
    assert one == two
    assert [text.decode() for text in one] == [
        "".join(f"    {line}\n" for line in text.replace("\ud800", "?").split("\n"))
        for text in texts
    ]


def test_events_are_cut_back_to_the_checkpoint(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_KEEP_CHECKPOINTS=10)
    train(settings)
    # As after a kill in step 9, in the middle of writing an event.
    for step in (8, 10):
        folder = settings.run_dir / "checkpoints" / f"step-{step:06d}"
        folder.rename(settings.run_dir / folder.name)
    (file,) = (settings.run_dir / "tensorboard").iterdir()
    os.truncate(file, file.stat().st_size - 7)
    train(settings)
    assert events_of(settings) == expected_of(settings)
    assert len(events_of(settings)["loss/train"]) == 10


@pytest.mark.slow
def test_a_stopped_or_killed_process_leaves_events_and_continues_them(
    data_dir: Path, tiny: TinySettings
) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = Process(data_dir)
        process.signal_at("step:", number)
        process.end()
        # A kill may come between a step's line and its event.
        events, expected = events_of(tiny()), expected_of(tiny())
        assert expected["optim/lr"][:-1] == events["optim/lr"][: len(expected["optim/lr"]) - 1]
        assert number == signal.SIGKILL or events == expected
    code, output = Process(data_dir).end()
    assert code == 0, output
    assert events_of(tiny()) == expected_of(tiny())
    assert len(events_of(tiny())["optim/lr"]) == 10


def test_a_run_that_starts_over_has_no_event_of_the_one_before(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_MAX_STEPS=3)
    train(settings)
    (settings.run_dir / "checkpoints").rename(settings.run_dir / "aside")
    train(settings)
    assert len(events_of(settings)["loss/train"]) == 3
    assert events_of(settings) == expected_of(settings)


def test_the_times_of_rewritten_steps_differ_by_their_durations(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=6))
    settings = tiny(TRAIN_MAX_STEPS=7)
    train(settings)
    reader = read_events(settings.run_dir)
    times = [event.wall_time for event in reader.Scalars("loss/train")]
    assert abs(times[-1] - time.time()) < 60
    records = read_metrics(settings.run_dir / "metrics.jsonl")
    took = [total_seconds([record]) for record in records]
    assert np.diff(times[:6]) == pytest.approx(took[1:6], abs=1e-4)
    assert reader.FirstEventTimestamp() == pytest.approx(times[0] - took[0], abs=1e-4)


def test_training_goes_on_if_events_cannot_be_written(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(TRAIN_MAX_STEPS=3)
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "tensorboard").write_text("a file where the folder should be")
    train(settings)
    assert len(metrics_of(settings)) == 3
    assert capsys.readouterr().err.count("without TensorBoard events") == 1


def test_a_full_disk_ends_the_events_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        StepRecord(step, tokens=step + 1, train_loss=1 / (step + 1), step_ms=100.0)
        for step in range(3000)
    ]
    log = EventLog(tmp_path / "tensorboard", records[:1], [], {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of a file is the smallest real disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for record in records[1:]:
            log.append(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("File too large") == 1
    read = read_events(tmp_path).Scalars("loss/train")
    assert 1000 < len(read) < 2999
    assert [event.step for event in read] == list(range(len(read)))


def test_training_needs_no_tensorboard(
    tiny: TinySettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    settings = tiny(TRAIN_MAX_STEPS=3)
    train(settings)
    assert len(metrics_of(settings)) == 3
    assert not (settings.run_dir / "tensorboard").exists()
    assert "TensorBoard" not in capsys.readouterr().err
