"""Whole runs of a tiny model on real text, in this process."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.data.dataset import open_dataset
from app.errors import NotFiniteError, UserError
from app.files import locked
from app.model.gpt import GPT, GPTConfig
from app.prepare.pipeline import prepare
from app.prepare.sources import DatasetSpec, TextSource
from app.runs.metrics import PAUSES
from app.settings.settings import Settings
from app.train.main import train
from tests.train.conftest import TinySettings, rewrite_checkpoint
from tests.train.processes import TINY


def metrics_of(settings: Settings) -> list[dict[str, Any]]:
    lines = (settings.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(settings: Settings) -> list[float]:
    return [record["train_loss"] for record in metrics_of(settings)]


def checkpoints_of(settings: Settings) -> list[str]:
    return sorted(path.name for path in (settings.run_dir / "checkpoints").iterdir())


def test_losses_are_those_of_a_loop_written_out(tiny: TinySettings) -> None:
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
    stream = torch.from_numpy(np.concatenate(dataset.train).astype(np.int64))
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 50257, 2, 16, 2))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01, foreach=False
    )
    windows = (len(stream) - 1) // 32
    expected = []
    for step in range(20):
        rows = [(step * 8 + row) % windows * 32 for row in range(8)]
        inputs = torch.stack([stream[row : row + 32] for row in rows])
        targets = torch.stack([stream[row + 1 : row + 33] for row in rows])
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses_of(settings) == pytest.approx(expected, abs=1e-4)


def test_losses_are_the_same_for_every_micro_batch_size(tiny: TinySettings) -> None:
    runs = []
    for size in (1, 2, 4, 8):
        settings = tiny(TRAIN_MICRO_BATCH_SIZE=size, TRAIN_RUN_NAME=f"by{size}")
        train(settings)
        runs.append(metrics_of(settings))
    for run in runs[1:]:
        for name in ("train_loss", "grad_norm"):
            expected = [record[name] for record in runs[0]]
            assert [record[name] for record in run] == pytest.approx(expected, rel=1e-4)


def test_gradients_are_clipped_to_the_given_norm(tiny: TinySettings) -> None:
    norms = {}
    for clip in ("0", "0.001"):
        settings = tiny(
            TRAIN_OPTIMIZER="adamw",
            TRAIN_GRAD_CLIP=clip,
            TRAIN_MAX_STEPS=3,
            TRAIN_RUN_NAME=f"clip{clip}",
        )
        train(settings)
        slots = load_file(settings.run_dir / "checkpoints/step-000003/optimizer.safetensors")
        norms[clip] = sum(
            float((value**2).sum()) for name, value in slots.items() if name.startswith("exp_avg.")
        )
        assert all(record["grad_norm"] > 0.1 for record in metrics_of(settings))
    assert norms["0.001"] ** 0.5 <= 0.000272  # 1 - 0.9**3 of the limit
    assert norms["0"] ** 0.5 > 0.01


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
    # Before them stands what is known without the device.
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
    assert re.fullmatch(r"Total time: \d+\.\d\ds \(\d+\.\d\d minutes\)", lines[-3])
    assert lines[-2] == "Total tokens processed: 768"
    assert re.fullmatch(r"Average tokens/sec: \d+\.\d\d", lines[-1])


def test_only_the_latest_checkpoints_stay_and_none_is_pickled(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_CHECKPOINT_EVERY=3)
    train(settings)
    assert checkpoints_of(settings) == ["step-000009", "step-000010"]
    for folder in (settings.run_dir / "checkpoints").iterdir():
        assert {file.name for file in folder.iterdir()} == {
            *("model.safetensors", "optimizer.safetensors", "state.json")
        }


def test_a_finished_run_says_so_and_changes_nothing(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(TRAIN_MAX_STEPS=3)
    train(settings)
    before = (settings.run_dir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train(settings)
    assert "is finished" in capsys.readouterr().out
    assert (settings.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_run_continues_with_more_steps_as_if_it_had_never_stopped(tiny: TinySettings) -> None:
    constant = {"TRAIN_LR_SCHEDULE": "constant"}
    unbroken = tiny(**constant, TRAIN_RUN_NAME="unbroken")
    train(unbroken)
    train(tiny(**constant, TRAIN_MAX_STEPS=4))
    continued = tiny(**constant)
    train(continued)
    assert losses_of(continued) == losses_of(unbroken)
    for file in ("model.safetensors", "optimizer.safetensors"):
        place = Path("checkpoints/step-000010") / file
        assert (continued.run_dir / place).read_bytes() == (unbroken.run_dir / place).read_bytes()


def test_a_run_continues_with_another_micro_batch_size(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=4, TRAIN_LR_SCHEDULE="constant"))
    continued = tiny(TRAIN_MICRO_BATCH_SIZE=8, TRAIN_LR_SCHEDULE="constant")
    train(continued)
    unbroken = tiny(TRAIN_RUN_NAME="unbroken", TRAIN_LR_SCHEDULE="constant")
    train(unbroken)
    assert losses_of(continued) == pytest.approx(losses_of(unbroken), rel=1e-5)


def test_metrics_and_samples_are_cut_back_to_the_checkpoint(tiny: TinySettings) -> None:
    unbroken = tiny(TRAIN_RUN_NAME="unbroken")
    train(unbroken)
    settings = tiny(TRAIN_KEEP_CHECKPOINTS=10)
    train(settings)
    # What a kill after step 7 would have left: the checkpoint of step 4, and later lines.
    for step in (8, 10):
        folder = settings.run_dir / "checkpoints" / f"step-{step:06d}"
        folder.rename(settings.run_dir / folder.name)
    metrics = settings.run_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    train(settings)
    assert losses_of(settings) == losses_of(unbroken)
    samples = [(run.run_dir / "samples.txt").read_text() for run in (settings, unbroken)]
    assert samples[0] == samples[1]


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


def test_other_model_data_or_seed_is_refused_with_the_difference(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=4))
    with pytest.raises(UserError, match="embd_size was 16 and is now 32"):
        train(tiny(MODEL_EMBD_SIZE=32))
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        train(tiny(TRAIN_SEED=1))


def test_a_second_train_on_the_same_run_is_refused(tiny: TinySettings) -> None:
    settings = tiny()
    settings.run_dir.mkdir(parents=True)
    with locked(settings.run_dir, "train"), pytest.raises(UserError, match="another process"):
        train(settings)


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
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["parameters"] == GPT(GPTConfig(32, 50257, 2, 16, 2)).num_parameters()
    assert stored["device"]["name"].startswith("CPU")


def test_a_run_without_a_checkpoint_keeps_its_old_metrics_aside(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_MAX_STEPS=3)
    train(settings)
    before = (settings.run_dir / "metrics.jsonl").read_bytes()
    shutil.rmtree(settings.run_dir / "checkpoints")
    with pytest.raises(UserError, match="exists, with no checkpoint"):
        train(tiny(TRAIN_MAX_STEPS=3, TRAIN_RESUME="never"))
    assert (settings.run_dir / "metrics.jsonl").read_bytes() == before
    train(settings)
    assert (settings.run_dir / "metrics.before-1.jsonl").read_bytes() == before
    assert len(metrics_of(settings)) == 3


def test_what_a_killed_save_has_left_is_removed(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=3))
    settings = tiny(TRAIN_MAX_STEPS=4)
    left = settings.run_dir / "checkpoints" / "step-000004.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    train(settings)
    assert checkpoints_of(settings) == ["step-000003", "step-000004"]


def test_a_held_out_split_shorter_than_a_window_is_not_measured(
    tiny: TinySettings, data_dir: Path
) -> None:
    prepare(
        DatasetSpec(TextSource("stdlib"), "short", total_tokens=2000, val_tokens=10),
        data_dir / "short",
    )
    settings = tiny(TRAIN_MAX_STEPS=3, TRAIN_DATASET_DIR="short")
    train(settings)
    assert all("val_loss" not in record for record in metrics_of(settings))


def test_a_disk_that_is_full_leaves_the_checkpoints_before_intact(data_dir: Path) -> None:
    # A limit on the size of a file is the smallest real disk; the model's file is larger.
    done = subprocess.run(
        [sys.executable, "-m", "app", "train"],
        cwd=data_dir,
        env=os.environ
        | TINY
        | {"DATA_DIR": str(data_dir), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert list((data_dir / "runs/run/checkpoints").iterdir()) == []


def test_an_update_that_ruins_the_held_out_loss_is_not_saved(tiny: TinySettings) -> None:
    train(tiny(TRAIN_MAX_STEPS=4))
    settings = tiny(TRAIN_MAX_STEPS=5)

    def ruin(slots: dict[str, Tensor]) -> None:
        # The loss and gradients of step 4 are fine; only what it adds to the weights is not.
        slots["exp_avg.transformer.ln_f.weight"][3] = torch.nan

    rewrite_checkpoint(settings.run_dir / "checkpoints/step-000004", "optimizer.safetensors", ruin)
    with pytest.raises(NotFiniteError, match="held out loss nan"):
        train(settings)
    assert checkpoints_of(settings) == ["step-000004"]
