"""Whole runs of a tiny model on real text, in this process."""

import importlib.metadata
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.data.dataset import open_dataset
from app.errors import NotFiniteError
from app.hardware.device import select_device
from app.model.gpt import GPT, GPTConfig
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from app.runs.checkpoint import open_checkpoint
from app.runs.checkpoint_state import PendingWork
from app.runs.checkpoints import latest_checkpoint
from app.runs.folder import RunFolder
from app.runs.metrics import PAUSES
from app.settings.settings import Settings
from app.tools.evaluate import evaluate
from app.tools.inspect import describe
from app.train.main import train, with_earlier_precision
from tests.train.conftest import TinySettings, rewrite_checkpoint
from tests.train.processes import assert_same_run


def metrics_of(settings: Settings) -> list[dict[str, Any]]:
    lines = (settings.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(settings: Settings) -> list[float]:
    return [record["train_loss"] for record in metrics_of(settings)]


def checkpoints_of(settings: Settings) -> list[str]:
    return sorted(path.name for path in (settings.run_dir / "checkpoints").iterdir())


def test_losses_equal_those_of_a_loop_that_is_written_out(tiny: TinySettings) -> None:
    settings = tiny(
        TRAIN_OPTIMIZER="adamw",
        TRAIN_SHUFFLE="false",
        TRAIN_MAX_STEPS=20,
        TRAIN_LR_SCHEDULE="constant",
        TRAIN_WARMUP_STEPS=0,
        TRAIN_GRAD_CLIP=0,
        TRAIN_BETAS="0.9,0.999",
        TRAIN_WEIGHT_DECAY=0.01,
        TRAIN_WEIGHT_DECAY_ON="all",
        TRAIN_LEARNING_RATE=3e-3,
    )
    train(settings)

    dataset = open_dataset(settings.train_dataset_dir)
    stream = torch.from_numpy(
        np.concatenate([shard[:] for shard in dataset.train]).astype(np.int64)
    )
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 50257, 2, 16, 2))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01, foreach=False
    )
    sequences = (len(stream) - 1) // 32
    expected = []
    for step in range(20):
        rows = [(step * 8 + row) % sequences * 32 for row in range(8)]
        inputs = torch.stack([stream[row : row + 32] for row in rows])
        targets = torch.stack([stream[row + 1 : row + 33] for row in rows])
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses_of(settings) == pytest.approx(expected, abs=1e-4)


def test_every_step_has_one_line_with_every_field(tiny: TinySettings) -> None:
    settings = tiny()
    train(settings)
    records = metrics_of(settings)
    assert [record["step"] for record in records] == list(range(10))
    assert [record["tokens"] for record in records] == [256 * (step + 1) for step in range(10)]
    for record in records:
        assert set(record) - {"val_loss", *PAUSES} == {
            *("step", "tokens", "train_loss", "lr", "grad_norm"),
            *("step_ms", "data_ms", "tokens_per_second", "mfu", "memory_bytes"),
        }
    assert [record["step"] for record in records if "val_loss" in record] == [4, 9]


def test_console_begins_and_ends_as_the_original(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(TRAIN_MAX_STEPS=3))
    lines = capsys.readouterr().out.splitlines()
    # Lines that need no device come first.
    begin = lines.index("Using device: cpu")
    assert not any(line.startswith("step:") for line in lines[:begin])
    assert lines[begin : begin + 4] == [
        "Using device: cpu",
        "Total batch size: 256",
        "Tokens per micro-batch: 128",
        "Gradient accumulation steps: 2",
    ]
    steps = [line for line in lines if line.startswith("step:") and "train_loss" in line]
    pattern = r"step:{}/3 train_loss:\d+\.\d{{4}} train_time:\d+ms token/s:\d+\.\d\d "
    assert all(re.match(pattern.format(step), line) for step, line in enumerate(steps))
    assert len(steps) == 3
    *_, total, tokens, rate, following = lines
    assert re.fullmatch(r"Total time: \d+\.\d\ds \(\d+\.\d\d minutes\)", total)
    assert tokens == "Total tokens processed: 768"
    assert re.fullmatch(r"Average tokens/sec: \d+\.\d\d", rate)
    assert following.startswith("next: python -m app sample ")


def test_the_results_are_those_of_evaluate(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(TRAIN_MAX_STEPS=3)
    train(settings)
    lines = capsys.readouterr().out.splitlines()
    evaluate(settings)
    measured = json.loads((settings.run_dir / "evaluations.jsonl").read_text())
    assert lines[-7:-4] == [
        f"Held-out loss: {measured['loss']:.4f}, perplexity {measured['perplexity']:,.2f}, "
        f"{measured['bits_per_byte']:.4f} bits per byte",
        f"Checkpoint: {settings.run_dir / 'checkpoints/step-000003'}",
        lines[-5],
    ]
    assert lines[-5].startswith("Whole run: 3 steps, 768 tokens, ")


@pytest.mark.parametrize("architecture", ("gpt2", "qwen3"))
def test_a_run_continues_with_more_steps_as_if_it_had_never_stopped(
    tiny: TinySettings, architecture: str
) -> None:
    constant = {"TRAIN_LR_SCHEDULE": "constant", "MODEL_ARCHITECTURE": architecture}
    unbroken = tiny(**constant, TRAIN_RUN_NAME="unbroken")
    train(unbroken)
    train(tiny(**constant, TRAIN_MAX_STEPS=4))
    continued = tiny(**constant)
    train(continued)
    assert losses_of(continued) == losses_of(unbroken)
    for file in ("model.safetensors", "optimizer.safetensors"):
        place = Path("checkpoints/step-000010") / file
        assert (continued.run_dir / place).read_bytes() == (unbroken.run_dir / place).read_bytes()
    assert losses_of(continued)[-1] < losses_of(continued)[0] - 1


def test_a_branch_from_before_the_cooldown_equals_a_run_that_was_begun_so(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    wsd = {"TRAIN_LR_SCHEDULE": "wsd", "TRAIN_COOLDOWN": 0.3, "TRAIN_MOMENTUM_WARMUP_STEPS": 12}
    train(tiny(**wsd))
    unbroken = tiny(**wsd, TRAIN_MAX_STEPS=20, TRAIN_RUN_NAME="unbroken")
    train(unbroken)
    branch = tiny(**wsd, TRAIN_MAX_STEPS=20, TRAIN_RUN_NAME="branch", TRAIN_BRANCH_FROM="run")
    capsys.readouterr()
    train(branch)
    assert "branch: a branch of run@7\n" in capsys.readouterr().out
    assert_same_run(branch.run_dir, unbroken.run_dir, last_step=20)
    stored = json.loads((branch.run_dir / "settings.json").read_text())
    assert stored["origin"] == latest_checkpoint(branch.run_dir).state.origin == "run@7"
    assert "  the run began as a branch of run@7" in list(describe(branch.run_dir, verify=True))
    # The other run is as it was.
    assert checkpoints_of(tiny(**wsd)) == ["step-000007", "step-000008", "step-000010"]


def test_a_run_continues_with_another_micro_batch_size(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=4, TRAIN_LR_SCHEDULE="constant"))
    continued = tiny(TRAIN_MICRO_BATCH_SIZE=8, TRAIN_LR_SCHEDULE="constant")
    train(continued)
    unbroken = tiny(TRAIN_RUN_NAME="unbroken", TRAIN_LR_SCHEDULE="constant")
    train(unbroken)
    assert losses_of(continued) == pytest.approx(losses_of(unbroken), rel=1e-5)


def test_a_run_continues_in_the_precision_that_auto_has_chosen(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(TRAIN_PRECISION="auto", TRAIN_MAX_STEPS=3))
    settings = tiny(TRAIN_PRECISION="auto", TRAIN_MAX_STEPS=4)
    recorded = json.loads(settings.run_dir.joinpath("settings.json").read_text())
    here = recorded["device"]["precision"]
    other = "float32" if here == "bf16" else "bf16"
    recorded["device"]["precision"] = other
    settings.run_dir.joinpath("settings.json").write_text(json.dumps(recorded))
    capsys.readouterr()
    train(settings)
    assert f", {other}, deterministic; " in capsys.readouterr().out


def test_a_precision_of_another_device_or_setting_is_not_kept(tiny: TinySettings) -> None:
    settings, cpu = tiny(TRAIN_PRECISION="auto"), select_device("cpu", "float32", "true")
    run = RunFolder(settings.run_dir)
    run.path.mkdir(parents=True)
    found = []
    for setting, name in (("auto", cpu.name), ("auto", "another CPU"), ("bf16", cpu.name)):
        recorded = {"device": {"name": name, "precision": "bf16"}}
        recorded["settings"] = {"train": {"precision": setting}}  # type: ignore[dict-item]
        run.settings.write_text(json.dumps(recorded))
        found.append(with_earlier_precision(cpu, settings.train, run).precision)
    assert found == ["bf16", "float32", "float32"]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_continues(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(TRAIN_KEEP_CHECKPOINTS=3)
    train(settings)
    unbroken = shutil.copytree(settings.run_dir, settings.run_dir.with_name("unbroken"))
    shutil.rmtree(settings.run_dir / "checkpoints/step-000010")
    os.truncate(settings.run_dir / "checkpoints/step-000008/optimizer.safetensors", 100_000)
    capsys.readouterr()
    train(settings)
    printed = capsys.readouterr()
    assert "it is now step-000008.damaged" in printed.err
    assert "continues at step 4" in printed.out
    assert_same_run(settings.run_dir, unbroken)


def test_weights_that_are_not_finite_end_the_run_before_the_update(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=4))
    settings = tiny()

    def ruin(weights: dict[str, Tensor]) -> None:
        weights["transformer.ln_f.weight"][3] = torch.nan

    rewrite_checkpoint(settings.run_dir / "checkpoints/step-000004", "model.safetensors", ruin)
    with pytest.raises(NotFiniteError, match="step 4: loss nan"):
        train(settings)
    assert checkpoints_of(settings) == ["step-000004"]
    assert len(metrics_of(settings)) == 4
    diagnosis = json.loads((settings.run_dir / "not-finite-000004.json").read_text())
    assert diagnosis["tensors"]["transformer.ln_f.weight"]["weight_norm"] == "nan"
    assert len(diagnosis["windows"]) == 8


def test_secrets_are_not_stored(tiny: TinySettings) -> None:
    settings = tiny(HF_TOKEN="hf_secret", TRAIN_MAX_STEPS=2, TRAIN_WARMUP_STEPS=0)
    assert settings.general.hf_token is not None
    train(settings)
    for file in settings.run_dir.rglob("*"):
        assert file.is_dir() or b"hf_secret" not in file.read_bytes(), file


def test_settings_are_stored_with_versions_device_and_size(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_MAX_STEPS=2, TRAIN_WARMUP_STEPS=0)
    train(settings)
    stored = json.loads((settings.run_dir / "settings.json").read_text())
    assert stored["settings"]["train"]["max_steps"] == 2
    assert stored["versions"]["torch"] == importlib.metadata.version("torch")
    assert stored["parameters"] == GPT(GPTConfig(32, 50257, 2, 16, 2)).num_parameters()
    assert stored["device"]["name"].startswith("CPU")


def test_a_held_out_split_shorter_than_one_sequence_is_not_measured(
    tiny: TinySettings, data_dir: Path
) -> None:
    prepare(
        DatasetSpec(TextSource("stdlib"), "short", total_tokens=2000, val_tokens=10),
        data_dir / "short",
    )
    settings = tiny(TRAIN_MAX_STEPS=3, TRAIN_DATASET_DIR="short")
    train(settings)
    assert all("val_loss" not in record for record in metrics_of(settings))


def test_an_update_that_ruins_the_held_out_loss_is_not_saved(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=4))
    settings = tiny(TRAIN_MAX_STEPS=5)

    def ruin(slots: dict[str, Tensor]) -> None:
        # The loss and gradients of step 4 are fine; only what it adds to the weights is not.
        slots["exp_avg.transformer.ln_f.weight"][3] = torch.nan

    rewrite_checkpoint(settings.run_dir / "checkpoints/step-000004", "optimizer.safetensors", ruin)
    with pytest.raises(NotFiniteError, match="held-out loss nan"):
        train(settings)
    assert len(metrics_of(settings)) == 4
    assert checkpoints_of(settings) == ["step-000004"]


def test_pending_work_is_done_even_if_fewer_steps_are_requested_now(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_MAX_STEPS=4)
    train(settings)
    folder = settings.run_dir / "checkpoints/step-000004"
    replace(open_checkpoint(folder).state, pending=PendingWork(samples=True)).write(folder)
    train(tiny(TRAIN_MAX_STEPS=3, TRAIN_WARMUP_STEPS=0))
    assert not open_checkpoint(folder).state.pending
