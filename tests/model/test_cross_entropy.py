"""The fused output layer beside float64 and torch's own, by Triton's interpreter on the CPU."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from app.model.cross_entropy import (
    VOCAB_MULTIPLE,
    fused_output_loss,
    linear_cross_entropy,
    output_loss,
)
from app.model.fp8 import matmul_fp8
from tests.python_process import run_python
from tests.torch_path import needs_torch_compile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: x,
    "huge": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
    "all rows equal": lambda x: x[:1].expand_as(x).clone(),
    "all logits equal": torch.ones_like,
    "one far above": lambda x: x.index_fill(1, torch.tensor([x.shape[1] // 2]), 500.0),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets_of(rows: int, vocab_size: int) -> Tensor:
    targets = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(1))
    # Both ends, where a mask that is one off would be seen.
    targets[0], targets[-1] = vocab_size - 1, 0
    return targets


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("rows", "vocab_size"), ((1, 1), (3, 1), (1, 65), (5, 4096), (3, 50257)))
def test_kernel_agrees_with_float64(
    rows: int, vocab_size: int, dtype: torch.dtype, kind: str
) -> None:
    from app.model.cross_entropy_kernel import softmax_gradient_

    columns = vocab_size + -vocab_size % VOCAB_MULTIPLE
    logits = LOGITS[kind](3 * numbers(rows, columns)).to(dtype)
    targets = targets_of(rows, vocab_size)
    exact = logits[:, :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()

    losses = softmax_gradient_(logits, targets, vocab_size)

    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    # The interpreter cuts bits off where a GPU rounds.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 4e-6
    actual = logits[:, :vocab_size].double()
    torch.testing.assert_close(actual, exact.grad, rtol=tolerance, atol=1e-6)
    assert not logits[:, vocab_size:].any()


@pytest.mark.parametrize(
    ("shape", "vocab_size", "is_compiled"),
    (
        ((1, 1), 1, False),
        ((5,), 127, False),
        ((2, 8), 128, False),
        ((3, 7), 65, False),
        pytest.param((3, 7), 65, True, marks=needs_torch_compile),
    ),
)
def test_loss_and_gradients_agree_with_torchs_cross_entropy(
    shape: tuple[int, ...], vocab_size: int, is_compiled: bool
) -> None:
    results = []
    fused = torch.compile(fused_output_loss) if is_compiled else fused_output_loss
    for loss_of in (fused, output_loss):
        hidden = numbers(*shape, 16).requires_grad_()
        weight = numbers(vocab_size, 16, seed=2).requires_grad_()
        targets = targets_of(math.prod(shape), vocab_size).view(shape)
        loss = loss_of(hidden, weight, targets)
        (loss / 3).backward()
        assert loss.dtype == torch.float32
        results.append((loss, hidden.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_under_autocast_logits_are_bf16_and_softmax_is_float32() -> None:
    hidden, weight = numbers(6, 32).requires_grad_(), numbers(65, 32, seed=2).requires_grad_()
    targets = targets_of(6, 65)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_output_loss(hidden, weight, targets)
        logits = F.linear(hidden, weight)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets), rtol=1e-6, atol=0)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@needs_torch_compile
@pytest.mark.parametrize("fp8", (False, True))
def test_compiled_code_under_autocast_agrees(fp8: bool) -> None:
    results = []
    for loss_of in (fused_output_loss, torch.compile(fused_output_loss)):
        hidden = numbers(48, 32).requires_grad_()
        weight = (0.1 * numbers(250, 32, seed=2)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(hidden, weight, targets_of(48, 250), fp8=fp8)
        (loss / 3).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results.append((loss.detach(), hidden.grad, weight.grad))
    for plain, compiled in zip(*results, strict=True):
        # Inductor rounds between fewer operations, which moves some values to the next 8-bit float.
        assert (compiled - plain).norm() < (0.03 if fp8 else 0.01) * plain.norm()


@pytest.mark.parametrize("fp8", (False, True))
def test_operator_passes_torchs_opcheck(fp8: bool) -> None:
    """Its fake implementation, its autograd formula, and both together under tracing."""
    x = numbers(16, 32).bfloat16().requires_grad_()
    weight = numbers(64, 32, seed=2).bfloat16().requires_grad_()
    torch.library.opcheck(linear_cross_entropy, (x, weight, targets_of(16, 50), 50, fp8))


def test_logits_are_allocated_once() -> None:
    large = 40 * 128

    class Allocations(TorchDispatchMode):
        storages: ClassVar[list[Any]] = []

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.numel() == large:
                    self.storages.append(tensor.untyped_storage())
            return result

    hidden, weight = numbers(40, 16).requires_grad_(), numbers(100, 16, seed=2).requires_grad_()
    targets = targets_of(40, 100)
    made = Allocations()  # type: ignore[no-untyped-call]
    with made:
        fused_output_loss(hidden, weight, targets).backward()
    assert len({storage._cdata for storage in made.storages}) == 1
    # What an operator does inside is seen only where its function is called itself.
    made.storages.clear()
    padded = F.pad(weight.detach(), (0, 0, 0, 28))
    with made:
        linear_cross_entropy._init_fn(hidden.detach(), padded, targets, 100, False)
    assert len({storage._cdata for storage in made.storages}) == 1


def test_repeated_losses_and_gradients_have_the_same_bits() -> None:
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            hidden = numbers(33, 16).requires_grad_()
            weight = numbers(65, 16, seed=2).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                loss = fused_output_loss(hidden, weight, targets_of(33, 65))
            loss.backward()
            results.append((loss, hidden.grad, weight.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


RANK = """
import os
import sys
import torch
from torch import distributed, nn
from app.model.cross_entropy import fused_output_loss

folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if size > 1:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
numbers = torch.Generator().manual_seed(0)
hidden = torch.randn(8, 16, generator=numbers)
targets = torch.randint(65, (8,), generator=numbers)

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(65, 16, generator=numbers))

    def forward(self, hidden, targets):
        return fused_output_loss(hidden, self.weight, targets)

head = Head()
parallel = nn.parallel.DistributedDataParallel(head) if size > 1 else head
share = slice(rank * 8 // size, (rank + 1) * 8 // size)
parallel(hidden[share], targets[share]).backward()
if rank == 0:
    print(head.weight.grad.double().flatten().tolist(), flush=True)
if size > 1:
    distributed.barrier()
# As the program ends: gloo's threads may still run, and abort a process that frees them.
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_ranks_average_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    gradients = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(folder), str(rank), str(size)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        printed = [rank.communicate()[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * size
        gradients.append(torch.tensor(json.loads(printed[0])))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_products_in_8_bit_floats_are_close() -> None:
    a, b = numbers(32, 64).bfloat16(), numbers(64, 48, seed=1).bfloat16()
    exact = a.float() @ b.float()
    for scaled in (a, 1e-4 * a, 1e4 * a):
        actual = matmul_fp8(scaled, b).float()
        error = (actual - scaled.float() @ b.float()).norm() / (scaled.float() @ b.float()).norm()
        assert error < 0.05
    gradient = a / a.abs().max()
    actual = matmul_fp8(gradient, b, a_is_gradient=True).float()
    assert (actual - gradient.float() @ b.float()).norm() / exact.norm() < 0.08
    assert not matmul_fp8(torch.zeros_like(a), b).any()


def test_fp8_gradient_has_the_direction_of_bf16s() -> None:
    results = []
    for fp8 in (False, True):
        hidden = numbers(64, 32).requires_grad_()
        weight = (0.1 * numbers(250, 32, seed=2)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = fused_output_loss(hidden, weight, targets_of(64, 250), fp8=fp8)
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results.append((loss, hidden.grad.flatten(), weight.grad.flatten()))
    (plain, *gradients), (loss, *of_fp8) = results
    torch.testing.assert_close(loss, plain, rtol=5e-3, atol=0)
    for one, other in zip(gradients, of_fp8, strict=True):
        assert F.cosine_similarity(one, other, dim=0) > 0.99


PTX = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from app.model.cross_entropy_kernel import _softmax_gradient_kernel

for capability in (80, 89, 90, 100, 120):
    source = ASTSource(
        _softmax_gradient_kernel,
        dict(logits="*bf16", targets="*i64", losses="*fp32", stride="i32",
             VOCAB="constexpr", COLUMNS="constexpr", BLOCK="constexpr"),
        {"VOCAB": 50257, "COLUMNS": 50304, "BLOCK": 4096},
        # Pointers and stride are multiples of 16, as Triton finds them at a launch.
        {(argument,): [["tt.divisibility", 16]] for argument in range(4)},
    )
    target = GPUTarget("cuda", capability, 32)
    print(compile(source, target=target, options={"num_warps": 8}).asm["ptx"])
"""


@pytest.mark.processes
def test_kernel_compiles_for_gpus_and_moves_16_bytes_at_a_time(tmp_path: Path) -> None:
    ptx = run_python(PTX, TRITON_INTERPRET=0, TRITON_CACHE_DIR=tmp_path).stdout
    assert ptx.count(".target sm_") == 5
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    # The target's logit alone is read as two bytes: once for each of the five.
    assert ptx.count("ld.global.b16") == 5
