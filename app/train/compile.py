"""Compiled code: its cache, what it requires, the compiled loss."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from app.distributed.data_parallel import LossFunction
from app.errors import UserError
from app.hardware.device import Device
from app.locks import has_flock
from app.model import cross_entropy
from app.model.gpt import GPT


def set_compile_cache_dir(cache_dir: Path) -> None:
    """Keep compiled code in `cache_dir`, unless the environment names another folder.

    Call it before torch's compiler is imported. If the path contains a space, or its file system
    has no flock, torch's own folder in /tmp is used.
    """
    inductor_dir = str((cache_dir / "inductor").absolute())
    # Inductor splits the compiler's command line at spaces, those in paths included.
    # And its locks need flock.
    if len(inductor_dir.split()) == 1 and has_flock(cache_dir):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", inductor_dir)
    os.environ.setdefault("TRITON_CACHE_DIR", str((cache_dir / "triton").absolute()))


def missing_build_tools(device_type: str) -> list[str]:
    """Return what torch.compile lacks on this machine, each with the command to install it.

    It generates C++ for a CPU, Triton and C for a GPU, all of which need Python's headers.
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


def should_compile(requested: bool, device: Device) -> bool:
    """Return True if compiled code is requested and torch.compile works here.

    Raises:
        UserError: it does not, and fp8 requires it.
    """
    missing = missing_build_tools(device.torch_device.type)
    if missing and device.precision == "fp8":
        raise UserError(
            "TRAIN_PRECISION=fp8 needs compiled code, and torch.compile does not find "
            + " and ".join(missing),
            "install it, or set TRAIN_PRECISION=auto",
        )
    return requested and not missing


def compile_note(requested: bool, device: Device) -> str:
    """Return a line on whether the run is compiled and, if not, why."""
    if not requested:
        return "not compiled: TRAIN_COMPILE=false"
    if missing := missing_build_tools(device.torch_device.type):
        return f"not compiled, and slower: torch.compile does not find {' and '.join(missing)}"
    return "the first step waits for the compiler"


def compiled_loss(model: GPT, device: Device) -> LossFunction:
    """Compile the model's loss in three pieces: embedding, block, output layer.

    Compiling the whole model at once takes 12 to 18 s longer and makes steps no faster
    (benchmarks/results). The model itself stays uncompiled for evaluation and sampling.

    Args:
        device: the loss is to be computed in its forward_pass.

    Returns:
        (inputs, targets), int64 [B, T] each, to the mean loss.
    """
    from torch._inductor import config

    config.deterministic = device.deterministic
    # The cache key does not include the backward pass of our operator.
    torch.compiler.config.cache_key_tag = cross_entropy.VERSION
    embed, loss = torch.compile(model.embed), torch.compile(model.loss)
    # Blocks differ only in their weights, so all share the code of the first.
    blocks = [torch.compile(block) for block in model.transformer.h]

    def compiled_forward(inputs: Tensor, targets: Tensor) -> Tensor:
        x = embed(inputs)
        for block in blocks:
            x = block(x)
        return loss(x, targets, fp8=device.precision == "fp8")

    return compiled_forward


def compile_cache_summary() -> str:
    """Return a line on how much compiled code came from the cache."""
    # Importing it earlier would lock in the cache folder.
    from torch._dynamo.utils import counters

    misses, hits = (counters["aot_autograd"][f"autograd_cache_{kind}"] for kind in ("miss", "hit"))
    return f"{misses} pieces of the model were compiled, {hits} came from the cache"
