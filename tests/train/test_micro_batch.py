"""The choice of a micro-batch, and its estimate compared with the memory of real processes."""

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from app.errors import UserError
from app.hardware.device import Device, Precision
from app.hardware.memory import MemoryEstimate
from app.model.gpt import GPTConfig
from app.model.language_model import ModelConfig
from app.model.qwen3 import Qwen3Config
from app.settings.train import TrainSettings
from app.train.micro_batch import estimate_memory, fit_to_memory
from tests.train.processes import TINY
from tests.train.tiny_model import checkpoint_state

CHECKOUT = Path(__file__).parents[2]
CONFIG = GPTConfig(context_length=256, num_layers=4, embd_size=256, num_heads=4)


def device(precision: Precision, device_type: str) -> Device:
    return Device(torch.device(device_type), "a device", precision, True, None)


def estimated(
    precision: Precision, device_type: str, world_size: int = 1, **settings: Any
) -> MemoryEstimate:
    cfg = TrainSettings(**settings)
    return estimate_memory(cfg, CONFIG, device(precision, device_type), world_size)


def micro_batch_size(requested: int | str, previous: int | None = None, world_size: int = 1) -> int:
    """Return the choice for steps of 12 sequences."""
    cfg = TrainSettings(micro_batch_size=requested, tokens_per_step=12 * 256)
    before = replace(checkpoint_state(1), micro_batch_size=previous) if previous else None
    cpu = device("float32", "cpu")
    return fit_to_memory(cfg, CONFIG, before, cpu, world_size, world_size)[1]


@pytest.mark.parametrize(
    ("requested", "previous", "world_size", "expected"),
    ((6, None, 1, 6), (6, 4, 2, 6), ("auto", 4, 1, 4), ("auto", 2, 3, 2)),
)
def test_a_requested_size_takes_precedence_over_that_of_the_checkpoint(
    requested: int | str, previous: int | None, world_size: int, expected: int
) -> None:
    assert micro_batch_size(requested, previous, world_size) == expected


def test_a_size_of_the_checkpoint_that_no_longer_divides_the_step_is_replaced() -> None:
    """8 does not divide 12."""
    assert micro_batch_size("auto", 8) in (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize(
    ("requested", "world_size", "problem", "fix"),
    (
        (
            5,
            1,
            "TRAIN_MICRO_BATCH_SIZE=5 does not divide the 12 sequences of a step "
            "(TRAIN_TOKENS_PER_STEP / MODEL_CONTEXT_LENGTH)",
            "choose one of: 1, 2, 3, 4, 6, 12",
        ),
        (
            4,
            2,
            "TRAIN_MICRO_BATCH_SIZE=4 does not divide the 6 sequences of a step that each process "
            "has (TRAIN_TOKENS_PER_STEP / MODEL_CONTEXT_LENGTH)",
            "choose one of: 1, 2, 3, 6",
        ),
        (
            "auto",
            5,
            "the 12 sequences of a step (TRAIN_TOKENS_PER_STEP / MODEL_CONTEXT_LENGTH) cannot be "
            "divided evenly among 5 processes",
            "set TRAIN_PROCESSES to one of 1, 2, 3, 4 ",
        ),
    ),
)
def test_a_step_that_cannot_be_divided_is_refused(
    requested: int | str, world_size: int, problem: str, fix: str
) -> None:
    with pytest.raises(UserError) as error:
        micro_batch_size(requested, world_size=world_size)
    assert error.value.problem == problem
    assert error.value.fix.startswith(fix)


PEAK = """
import sys
import torch
from app.model.architectures import build_config, build_model
from app.runs.checkpoint import Snapshot
from app.train.compile import compiled_loss
from app.hardware.device import select_device
from app.settings.train import TrainSettings
from app.train.optimizer import build_optimizers
device = select_device("cpu", sys.argv[1], "auto")
is_compiled = sys.argv[2] == "compiled"
recompute = sys.argv[2] == "recomputed"
torch.manual_seed(0)
shape = dict(context_length=256, vocab_size=50257, num_layers=4, embd_size=256, num_heads=4)
shape |= dict(head_dim=128, tie_embeddings=False) if sys.argv[4] == "qwen3" else {}
model = build_model(build_config({"architecture": sys.argv[4], **shape}))
model.recompute = recompute
loss_of = compiled_loss(model, device) if is_compiled else model
optimizers = build_optimizers(model, TrainSettings())
optimizers.begin_step(0, 1e-3)
idx = torch.randint(0, 50257, (int(sys.argv[3]), 256))
for _ in range(2):
    with device.forward_pass():
        loss = loss_of(idx, idx)
    loss.backward()
    optimizers.step()
Snapshot().take(model, optimizers)
print(device.peak_memory_bytes())
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("precision", "code", "architecture"),
    (
        ("float32", "plain", "gpt2"),
        ("bf16", "plain", "gpt2"),
        ("bf16", "compiled", "gpt2"),
        ("bf16", "recomputed", "gpt2"),
        ("bf16", "plain", "qwen3"),
    ),
)
def test_the_estimate_is_an_upper_bound_of_the_memory_of_a_process(
    precision: Precision, code: str, architecture: str
) -> None:
    config: ModelConfig = CONFIG
    if architecture == "qwen3":
        config = Qwen3Config(context_length=256, num_layers=4, embd_size=256, num_heads=4)
    recompute: Literal["true", "false"] = "true" if code == "recomputed" else "false"
    cfg = TrainSettings(compile=code == "compiled", recompute=recompute)
    estimate = estimate_memory(cfg, config, device(precision, "cpu"), 1)
    for batch_size in (1, 8):
        command = [sys.executable, "-c", PEAK, precision, code, str(batch_size), architecture]
        taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert estimate.bytes_for(batch_size) / 2 < taken < estimate.bytes_for(batch_size)


def test_code_for_apples_gpu_is_counted_as_uncompiled() -> None:
    compiled, plain = (estimated("float32", "mps", compile=it) for it in (True, False))
    assert compiled == plain
    on_cpu = estimated("float32", "cpu", compile=False)
    assert compiled.bytes_per_sequence == on_cpu.bytes_per_sequence
    # A snapshot for a checkpoint is in the same memory.
    assert compiled.fixed_bytes - 10**9 == on_cpu.fixed_bytes


def test_the_estimate_computes_nothing() -> None:
    """The estimate of GPT-2 XL, which would need 25 GB."""
    config = GPTConfig(num_layers=48, embd_size=1600, num_heads=25)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    estimate = estimate_memory(TrainSettings(), config, device("bf16", "cuda"), 1)
    assert estimate.fixed_bytes > 16 * 1_550_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def test_divided_state_takes_at_least_the_bytes_of_the_largest_parameter() -> None:
    whole, eighth, least = (
        estimated("bf16", "cuda", ranks, shard_optimizer=True).fixed_bytes
        for ranks in (1, 8, 10**9)
    )
    embedding = CONFIG.vocab_size * CONFIG.embd_size
    rest = CONFIG.context_length * CONFIG.embd_size + 4 * (12 * 256 + 13) * 256 + 2 * 256
    assert whole - least == 8 * rest
    assert whole - eighth == 8 * (embedding + rest) * 7 // 8 - 8 * embedding
    assert estimated("bf16", "cuda", 8).fixed_bytes == whole


@pytest.mark.slow
@pytest.mark.processes
def test_training_stays_below_a_memory_limit(data_dir: Path) -> None:
    """A real run in a process with a memory limit gives the same losses."""
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
        ("limited", bytes_after_import() + (1 << 30)),
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


def bytes_after_import() -> int:
    """Return the memory that a process takes by importing torch."""
    code = "import torch, app.train.trainer; print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    found = re.search(r"VmData:\s+(\d+)", ended.stdout)
    assert found is not None
    return int(found[1]) << 10


def test_peak_memory_excludes_the_parent_process() -> None:
    code = (
        "from app.hardware.device import select_device\n"
        "print(select_device('cpu', 'float32', 'auto').peak_memory_bytes())"
    )
    ballast = b"x" * (1 << 30)
    command = [sys.executable, "-c", code]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 50_000_000 < taken < len(ballast)
