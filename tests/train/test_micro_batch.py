"""Micro-batches that fit: estimated, and held against what real processes take."""

import json
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from app.model.gpt import GPTConfig
from app.train import micro_batch
from app.train.micro_batch import (
    MemoryEstimate,
    available_bytes,
    estimate_memory,
    largest_batch_that_fits,
)
from tests.train.processes import TINY

CHECKOUT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = GPTConfig(context_length=256, num_layers=4, embd_size=256, num_heads=4)

PEAK = """
import sys
import torch
from app.model.gpt import GPT, GPTConfig
from app.runs.checkpoint import Snapshot
from app.train.compile import compiled_loss
from app.hardware.device import select_device
from app.settings.groups import TrainSettings
from app.train.optimizer import build_optimizers
device = select_device("cpu", sys.argv[1], "auto")
is_compiled = sys.argv[2] == "compiled"
torch.manual_seed(0)
model = GPT(GPTConfig(context_length=256, num_layers=4, embd_size=256, num_heads=4))
loss_of = compiled_loss(model, device) if is_compiled else model
optimizers = build_optimizers(model, TrainSettings())
optimizers.set_learning_rate(1e-3)
idx = torch.randint(0, 50257, (int(sys.argv[3]), 256))
for _ in range(2):
    with device.forward_pass():
        loss = loss_of(idx, idx)
    loss.backward()
    optimizers.step()
Snapshot().take(model, optimizers)
print(device.peak_memory_bytes())
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("precision", "code"),
    (("float32", "plain"), ("bf16", "plain"), ("bf16", "compiled")),
)
def test_estimate_is_an_upper_bound_of_what_a_process_takes(precision: Any, code: str) -> None:
    need = estimate_memory(CONFIG, precision, "cpu", compiled=code == "compiled")
    for windows in (1, 8):
        command = [sys.executable, "-c", PEAK, precision, code, str(windows)]
        taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert need.of(windows) / 2 < taken < need.of(windows)


def test_estimate_computes_nothing() -> None:
    """GPT-2 XL's would need 25 GB."""
    config = GPTConfig(num_layers=48, embd_size=1600, num_heads=25)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    need = estimate_memory(config, "bf16", "cuda", compiled=True)
    assert need.fixed > 16 * 1_550_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def test_a_shared_out_state_needs_less_but_not_less_than_the_largest_parameter() -> None:
    whole, eighth, least = (
        estimate_memory(CONFIG, "bf16", "cuda", compiled=True, state_shards=shards).fixed
        for shards in (1, 8, 10**9)
    )
    embedding = CONFIG.vocab_size * CONFIG.embd_size
    rest = CONFIG.context_length * CONFIG.embd_size + 4 * (12 * 256 + 13) * 256 + 2 * 256
    assert whole - least == 8 * rest
    assert whole - eighth == 8 * (embedding + rest) * 7 // 8 - 8 * embedding


@pytest.mark.parametrize(
    ("sizes", "available", "chosen"),
    (
        ([1, 2, 4, 8, 16], 10**12, 4),  # more would not help a CPU
        ([1, 2, 4, 8, 16], 5 * 10**9, 2),
        ([1, 3, 9], 10**12, 3),
        ([1, 2], 10, 1),  # it may fit all the same: the estimate is an upper bound
    ),
)
def test_the_largest_that_fits_and_helps(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], available: int, chosen: int
) -> None:
    monkeypatch.setattr(micro_batch, "available_bytes", lambda _device: available)
    assert largest_batch_that_fits(sizes, 1024, MemoryEstimate(10**9, 10**9), CPU) == chosen


def test_what_is_left_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 600\n")
    assert list(micro_batch._left_of_cgroup(tmp_path)) == [1600]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(micro_batch._left_of_cgroup(tmp_path)) == []


@pytest.mark.processes
def test_training_stays_below_the_limit_it_is_given(data_dir: Path) -> None:
    """A real run in a process that may not take more; the steps are those of any other."""
    settings = TINY | {
        "MODEL_CONTEXT_LENGTH": "128",
        "TRAIN_TOKENS_PER_STEP": "4096",
        "TRAIN_MICRO_BATCH_SIZE": "auto",
        "TRAIN_MAX_STEPS": "1",
        "TRAIN_WARMUP_STEPS": "0",
        "TRAIN_VAL_EVERY": "0",
        "TRAIN_SAMPLE_EVERY": "0",
        "DATA_DIR": str(data_dir),
    }
    sizes, losses = [], []
    for name, limit in (
        ("free", resource.RLIM_INFINITY),
        ("limited", free_of_this_process() + (1 << 30)),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "app", "train"],
            cwd=CHECKOUT,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit)),
            env={"PATH": "/usr/bin:/bin", **settings, "TRAIN_RUN_NAME": name},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        found = re.search(r"Tokens per micro-batch: (\d+)", ended.stdout)
        assert found is not None
        sizes.append(int(found[1]))
        lines = (data_dir / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train_loss"] for line in lines])
    assert sizes[1] < sizes[0] == 4096
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def free_of_this_process() -> int:
    """What a process that has imported torch has taken already."""
    code = "import torch, app.train.trainer; print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    found = re.search(r"VmData:\s+(\d+)", ended.stdout)
    assert found is not None
    return int(found[1]) << 10


def test_peak_is_not_that_of_the_process_which_started_this_one() -> None:
    code = (
        "from app.hardware.device import select_device\n"
        "print(select_device('cpu', 'float32', 'auto').peak_memory_bytes())"
    )
    ballast = b"x" * (1 << 30)
    command = [sys.executable, "-c", code]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 50_000_000 < taken < len(ballast)


def test_memory_of_this_machine_is_known() -> None:
    assert 100_000_000 < available_bytes(CPU) < 1 << 50
