"""Compiled code computes the model's loss, and only the training step is compiled."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.distributed.data_parallel import LossFunction
from app.errors import UserError
from app.hardware.device import Device, select_device
from app.model.gpt import GPT, GPTConfig
from app.model.language_model import LanguageModel
from app.model.qwen3 import Qwen3, Qwen3Config
from app.train.compile import (
    compile_note,
    compile_problem,
    compiled_loss,
    set_compile_cache_dir,
)
from tests.model.generation import generate
from tests.python_process import run_python
from tests.torch_path import needs_torch_compile

CONFIG = GPTConfig(context_length=32, vocab_size=50257, num_layers=3, embd_size=32, num_heads=2)
CPU = torch.device("cpu")
DEVICE = Device(CPU, "any", "float32", deterministic=False, peak_flops=None)


def new_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def test_apples_gpu_trains_uncompiled_and_says_why() -> None:
    device = replace(DEVICE, torch_device=torch.device("mps"))
    problem = compile_problem(device)
    assert problem is not None
    assert compile_note(device, False, problem) == (
        "not compiled, and slower: torch.compile is a prototype for Apple's GPU; "
        "TRAIN_COMPILE=false hides this line"
    )


def batch(seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (4, 33), generator=numbers)


def losses_of(
    model: LanguageModel, loss_of: LossFunction, *, bf16: bool, steps: int
) -> list[float]:
    """Train on a few batches again and again, so that the loss falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        tokens = batch(step % 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_torch_compile
@pytest.mark.slow
def test_compiled_training_equals_uncompiled_training() -> None:
    """For 50 steps, in float32 and in bf16 but for their rounding."""
    plain = new_model()
    expected = losses_of(plain, plain, bf16=False, steps=50)
    assert expected[-1] < expected[0] - 1
    for bf16, tolerance in ((False, 1e-4), (True, 3e-2)):
        model = new_model()
        losses = losses_of(model, compiled_loss(model, DEVICE), bf16=bf16, steps=50)
        assert losses == pytest.approx(expected, abs=tolerance)


@needs_torch_compile
@pytest.mark.slow
def test_all_blocks_of_a_qwen3_share_one_compiled_code() -> None:
    from torch._dynamo.utils import counters

    def new_qwen3() -> Qwen3:
        torch.manual_seed(0)
        return Qwen3(Qwen3Config(32, num_layers=5, embd_size=32, num_heads=2, head_dim=8))

    plain, model = new_qwen3(), new_qwen3()
    expected = losses_of(plain, plain, bf16=False, steps=5)
    torch.compiler.reset()
    counters.clear()
    losses = losses_of(model, compiled_loss(model, DEVICE), bf16=False, steps=5)
    assert losses == pytest.approx(expected, abs=1e-4)
    # Embedding, block and output layer.
    assert counters["stats"]["unique_graphs"] == 3


@needs_torch_compile
def test_evaluation_and_sampling_compile_nothing() -> None:
    from torch._dynamo.utils import counters

    model = new_model()
    compiled = compiled_loss(model, DEVICE)
    losses_of(model, compiled, bf16=True, steps=2)
    made = dict(counters["stats"])
    with torch.no_grad():
        for rows, length in itertools.product((1, 3), (5, 9)):
            tokens = batch(0)[:rows, : length + 1]
            model(tokens[:, :-1], tokens[:, 1:])
    generate(model, torch.tensor([[50256]]), 12)
    losses_of(model, compiled, bf16=True, steps=1)
    assert dict(counters["stats"]) == made


@needs_torch_compile
@pytest.mark.slow
def test_the_cache_keeps_deterministic_code_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cache_misses = []
    for deterministic in ("false", "true", "false"):
        torch.compiler.reset()
        counters.clear()
        device = select_device("cpu", "float32", deterministic)
        with device.forward_pass():
            loss = compiled_loss(new_model(), device)(batch(0)[:, :-1], batch(0)[:, 1:])
        loss.backward()
        cache_misses.append(counters["aot_autograd"]["autograd_cache_miss"])
    assert cache_misses[0] == cache_misses[1] > cache_misses[2] == 0


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names no caches, and is restored later."""
    for name in CACHES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ("cache", "own cache", "it's", 'a"b', "a\\b"))
@pytest.mark.usefixtures("no_caches")
def test_the_cache_is_below_data_dir_unless_the_compiler_cannot_take_its_name(
    tmp_path: Path, name: str
) -> None:
    set_compile_cache_dir(tmp_path / name)
    inductor = str(tmp_path / name / "inductor") if name == "cache" else None
    assert [os.environ.get(name) for name in CACHES] == [inductor, str(tmp_path / name / "triton")]


@pytest.mark.usefixtures("no_caches")
def test_the_cache_is_not_where_execution_is_forbidden() -> None:
    # Linux mounts /proc so everywhere.
    set_compile_cache_dir(Path("/proc/self/cache"))
    assert [os.environ.get(name) for name in CACHES] == [None, None]


@pytest.mark.usefixtures("no_caches")
def test_a_cache_that_the_environment_names_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/own")
    set_compile_cache_dir(tmp_path / "cache")
    expected = ["/own", str(tmp_path / "cache" / "triton")]
    assert [os.environ.get(name) for name in CACHES] == expected


BROKEN = UserError("torch.compile does not work: no space", "free some")
WAITS, REFUSED = "the first step waits for the compiler", "not compiled: TRAIN_COMPILE=false"
FAILED = "not compiled, and slower: torch.compile does not work: no space; free some"
DIFFERS = "up to here: losses now differ in their last digits from an unbroken run's"


@pytest.mark.parametrize(
    ("compiles", "problem", "before", "expected"),
    (
        (True, None, None, WAITS),
        (True, None, True, WAITS),
        (True, None, False, f"{WAITS}\nnot compiled {DIFFERS}"),
        (False, None, None, REFUSED),
        (False, None, False, REFUSED),
        (False, None, True, f"{REFUSED}\ncompiled {DIFFERS}"),
        (False, BROKEN, None, FAILED),
        (False, BROKEN, True, f"{FAILED}\ncompiled {DIFFERS}"),
    ),
)
def test_a_run_says_whether_it_is_compiled_and_whether_that_has_changed(
    compiles: bool, problem: UserError | None, before: bool | None, expected: str
) -> None:
    assert compile_note(DEVICE, compiles, problem, before) == expected


def test_8_bit_floats_are_refused_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    device = Device(torch.device("cuda"), "a GPU", "fp8", False, None)
    problem = compile_problem(device)
    assert problem is not None
    with pytest.raises(
        UserError, match=r"fp8 needs .* does not find .*a C\+\+ compiler"
    ) as refusal:
        compile_note(device, False, problem)
    assert "TRAIN_PRECISION=auto" in refusal.value.fix
    assert "slower" in compile_note(replace(device, precision="bf16"), False, problem)


HANGS = """
import os
from app.hardware.device import select_device
from app.hardware.proc import child_processes
from app.train import compile
compile._TRIAL_SECONDS = 3.0
print(compile.compile_problem(select_device("cpu", "float32", "auto")))
print(len(child_processes(os.getpid())), flush=True)
os._exit(0)
"""


@pytest.mark.processes
def test_a_compiler_that_hangs_is_killed(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexec sleep 1000\n")
    compiler.chmod(0o755)
    ended = run_python(HANGS, CXX=compiler, TORCHINDUCTOR_CACHE_DIR=tmp_path / "c")
    assert ended.stdout == (
        "torch.compile does not work: it has not ended after 3 s\n"
        "  fix: see whether `g++` (or what CXX names) and the disks answer\n0\n"
    )


SWITCHED_OFF = """
from torch._inductor import config
from app.hardware.device import select_device
from app.train.compile import compile_problem
print(compile_problem(select_device("cpu", "float32", "false")))
print(config.cpp_cache_precompile_headers)
"""


@pytest.mark.processes
def test_a_compiler_that_is_switched_off_is_noticed(tmp_path: Path) -> None:
    """Headers are not precompiled below a TMPDIR with a space, which that would not take."""
    folder = tmp_path / "with space"
    folder.mkdir()
    ended = run_python(SWITCHED_OFF, TORCHDYNAMO_DISABLE=1, TMPDIR=folder)
    assert ended.stdout == (
        "torch.compile compiles nothing\n  fix: unset TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE "
        "and TORCHDYNAMO_SUPPRESS_ERRORS\nFalse\n"
    )
