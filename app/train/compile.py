"""Compiled code: where it is kept, what it needs, whether it was found again."""

import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from app.errors import UserError
from app.hardware.device import Device
from app.model import cross_entropy
from app.model.gpt import GPT

LossFunction = Callable[[Tensor, Tensor], Tensor]


def set_compile_cache_dir(cache_dir: Path) -> None:
    """Keep compiled code in `cache_dir`. Call it before torch's compiler is imported.

    What the user has set stays.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((cache_dir / "inductor").absolute()))
    os.environ.setdefault("TRITON_CACHE_DIR", str((cache_dir / "triton").absolute()))


def missing_build_tools(device_type: str) -> list[str]:
    """Return what torch.compile needs and does not find here, each with the way to get it.

    It writes C++ for a CPU; for a GPU Triton, and a launcher in C; all of it calls Python.
    """
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if device_type == "cuda":
        compilers += [os.environ.get("CC"), "gcc", "clang"]
    missing = []
    if device_type == "cuda" and find_spec("triton") is None:
        missing.append("Triton (pip install triton)")
    if not any(compiler and shutil.which(compiler) for compiler in compilers):
        missing.append("a C++ compiler (apt-get install g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's headers (apt-get install python3-dev)")
    return missing


def is_compiled(wanted: bool, device: Device) -> bool:
    """Return True if compiled code is wanted and torch.compile has what it needs here.

    Raises:
        UserError: it has not, and the output layer in 8-bit floats is compiled code only.
    """
    missing = missing_build_tools(device.torch_device.type)
    if missing and device.precision == "fp8":
        raise UserError(
            "TRAIN_PRECISION=fp8 needs compiled code, and torch.compile does not find "
            + " and ".join(missing),
            "install it, or set TRAIN_PRECISION=auto",
        )
    return wanted and not missing


def compiled_loss(model: GPT, device: Device) -> LossFunction:
    """Compile the model's loss: embedding, one block for all blocks, output layer.

    Compiling the whole model at once takes 12 to 18 s longer and makes steps no faster
    (benchmarks/results). The model itself stays as it is, so that evaluation and sampling compile
    nothing.

    Args:
        device: in whose forward_pass the loss is to be computed.

    Returns:
        (inputs, targets), int64 [B, T] each, to the mean loss.
    """
    from torch._inductor import config

    config.deterministic = device.deterministic
    # By itself the cache does not tell versions of our operator's backward pass apart.
    torch.compiler.config.cache_key_tag = cross_entropy.VERSION
    embed, loss = torch.compile(model.embed), torch.compile(model.loss)
    # Blocks differ in their weights only: the second finds the first one's code.
    blocks = [torch.compile(block) for block in model.transformer.h]

    def by_blocks(inputs: Tensor, targets: Tensor) -> Tensor:
        x = embed(inputs)
        for block in blocks:
            x = block(x)
        return loss(x, targets, fp8=device.precision == "fp8")

    return by_blocks


def compile_cache_summary() -> str:
    """Return a line that says how much compiled code came from the cache."""
    # Importing it fixes the place of the cache.
    from torch._dynamo.utils import counters

    made, found = (counters["aot_autograd"][f"autograd_cache_{one}"] for one in ("miss", "hit"))
    return f"{made} pieces of the model were compiled, {found} came from the cache"
