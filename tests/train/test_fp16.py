"""Whole runs in fp16: overflows are skipped, and a run cut around them is the unbroken one."""

import json
from dataclasses import replace
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


@pytest.mark.slow
def test_a_run_cut_before_between_and_after_overflows_equals_the_unbroken_one(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, cut = (tiny(**FP16, TRAIN_RUN_NAME=name) for name in ("unbroken", "cut"))
    for name, run in (("unbroken", unbroken), ("cut", cut)):
        train(tiny(**FP16, TRAIN_RUN_NAME=name, TRAIN_MAX_STEPS=1))
        folder = run.run_dir / "checkpoints/step-000001"
        # What 2,000 updates at a time would lead to: too large for this model's gradients.
        replace(open_checkpoint(folder).state, loss_scale=2.0**18).write(folder)
    train(unbroken)
    printed = capsys.readouterr().out.splitlines()
    records = metrics_of(unbroken)
    skipped = [record["step"] for record in records if record.get("skipped")]
    assert skipped[:2] == [1, 2]
    assert len(skipped) < 6
    for stop in sorted({*skipped[1:], *(step + 1 for step in skipped), 10}):
        train(tiny(**FP16, TRAIN_RUN_NAME="cut", TRAIN_MAX_STEPS=stop))
    assert_same_run(cut.run_dir, unbroken.run_dir)

    assert [record["step"] for record in records if "grad_norm" not in record] == skipped
    halved = [sum(earlier < step for earlier in skipped) for step in range(11)]
    scales = [2.0 ** (18 - times) for times in halved]
    assert [record["loss_scale"] for record in records] == [2.0**14, *scales[1:10]]
    (line,) = (line for line in printed if line.startswith("step:1/10 "))
    assert " grad_norm:inf skipped:fp16_overflow loss_scale:262144 memory:" in line
    total = f"{len(skipped)} of 10 updates were skipped, because gradients overflowed in fp16"
    assert total in printed
    of_report = {figure.name: figure.value for figure in figures(read_run(cut.run_dir))}
    assert of_report["skipped updates"] == str(len(skipped))
    state = open_checkpoint(cut.run_dir / "checkpoints/step-000010").state
    assert (state.loss_scale, state.loss_scale_updates) == (scales[10], 9 - skipped[-1])


def test_a_run_continues_in_another_precision(tiny: TinySettings) -> None:
    """The loss scale is no part of a run's identity."""
    for steps, precision in ((1, "float32"), (2, "fp16"), (3, "float32"), (4, "fp16")):
        train(tiny(**FP16 | {"TRAIN_MAX_STEPS": steps, "TRAIN_PRECISION": precision}))
    scales = [record.get("loss_scale") for record in metrics_of(tiny())]
    assert scales == [None, 2.0**14, None, 2.0**14]


def test_losses_are_within_rounding_of_those_in_float32(tiny: TinySettings) -> None:
    losses = {}
    for precision in ("float32", "fp16"):
        changes = {"TRAIN_PRECISION": precision, "TRAIN_RUN_NAME": precision}
        settings = tiny(**FP16 | changes)
        train(settings)
        losses[precision] = [record["train_loss"] for record in metrics_of(settings)]
    assert losses["fp16"] == pytest.approx(losses["float32"], rel=2e-3)
    assert losses["fp16"] != losses["float32"]
