"""Whole runs in fp16: overflows are skipped, and a run cut around them is the unbroken one."""

import json
from typing import Any

import pytest

from app.runs.checkpoint import open_checkpoint
from app.settings.settings import Settings
from app.tools.report.facts import figures
from app.tools.report.run_data import read_run
from app.train.main import train
from tests.train.conftest import TinySettings
from tests.train.processes import assert_same_run

# A CPU multiplies slowly in fp16, so a step has one sequence.
FP16 = {
    "TRAIN_PRECISION": "fp16",
    "TRAIN_LR_SCHEDULE": "constant",
    "TRAIN_TOKENS_PER_STEP": 32,
    "TRAIN_MICRO_BATCH_SIZE": 1,
    "TRAIN_WARMUP_STEPS": 0,
    "TRAIN_VAL_EVERY": 0,
    "TRAIN_SAMPLE_EVERY": 0,
    "TRAIN_KEEP_CHECKPOINTS": 9,
}


def metrics_of(settings: Settings) -> list[dict[str, Any]]:
    lines = (settings.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_cut_before_and_after_an_overflow_equals_the_unbroken_one(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, cut = (tiny(**FP16, TRAIN_RUN_NAME=name) for name in ("unbroken", "cut"))
    train(unbroken)
    printed = capsys.readouterr().out.splitlines()
    for stop in (1, 2, 3, 10):
        train(tiny(**FP16, TRAIN_RUN_NAME="cut", TRAIN_MAX_STEPS=stop))
    assert_same_run(cut.run_dir, unbroken.run_dir)

    # A gradient norm of 3.7, times 65,536, is beyond what fp16 can represent.
    records = metrics_of(unbroken)
    assert [record["step"] for record in records if record.get("skipped")] == [1]
    assert [record["step"] for record in records if "grad_norm" not in record] == [1]
    assert [record["loss_scale"] for record in records] == [2.0**16] * 2 + [2.0**15] * 8
    (line,) = (line for line in printed if line.startswith("step:1/10 "))
    assert " grad_norm:inf skipped:fp16_overflow loss_scale:65536 memory:" in line
    assert "1 of 10 updates were skipped, because gradients overflowed in fp16" in printed
    of_report = {figure.name: figure.value for figure in figures(read_run(cut.run_dir))}
    assert of_report["skipped updates"] == "1"
    for run, step, expected in (
        (cut, 1, (2.0**16, 1)),
        (cut, 2, (2.0**15, 0)),
        (cut, 3, (2.0**15, 1)),
        (unbroken, 10, (2.0**15, 8)),
    ):
        state = open_checkpoint(run.run_dir / f"checkpoints/step-{step:06d}").state
        assert (state.loss_scale, state.loss_scale_updates) == expected


def test_a_run_continues_in_another_precision(tiny: TinySettings) -> None:
    """The loss scale is no part of a run's identity."""
    for steps, precision in ((1, "float32"), (2, "fp16"), (3, "float32"), (4, "fp16")):
        train(tiny(**FP16 | {"TRAIN_MAX_STEPS": steps, "TRAIN_PRECISION": precision}))
    scales = [record.get("loss_scale") for record in metrics_of(tiny())]
    assert scales == [None, 2.0**16, None, 2.0**16]


def test_losses_are_within_rounding_of_those_in_float32(tiny: TinySettings) -> None:
    losses = {}
    for precision in ("float32", "fp16"):
        changes = {"TRAIN_TOKENS_PER_STEP": 128, "TRAIN_MAX_STEPS": 6, "TRAIN_RUN_NAME": precision}
        settings = tiny(**FP16 | changes | {"TRAIN_PRECISION": precision})
        train(settings)
        losses[precision] = [record["train_loss"] for record in metrics_of(settings)]
    assert losses["fp16"] == pytest.approx(losses["float32"], rel=2e-3)
    assert losses["fp16"] != losses["float32"]
