"""Compiled code: where it is kept, how much of the model it covers, whether it was found again."""

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from app.model.gpt import GPT
from app.train.device import Device

Extent = Literal["model", "blocks"]
_WHOLE_MODEL_PAYS_SECONDS = 1200.0
LossFunction = Callable[[Tensor, Tensor], Tensor]


def keep_compiled_code(cache_dir: Path) -> None:
    """Let compiled code survive in `cache_dir`; before choose_device, which lets torch fix its own.

    What the user has set stays.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((cache_dir / "inductor").absolute()))
    os.environ.setdefault("TRITON_CACHE_DIR", str((cache_dir / "triton").absolute()))


def missing_for_compiling(device_type: str) -> list[str]:
    """What torch.compile needs and does not find here, in words.

    It writes C++ for a CPU, and for a GPU a launcher in C; both call Python.
    """
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if device_type == "cuda":
        compilers += [os.environ.get("CC"), "gcc", "clang"]
    missing = []
    if not any(compiler and shutil.which(compiler) for compiler in compilers):
        missing.append("a C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's headers")
    return missing


def can_compile(device: Device) -> bool:
    """Whether torch.compile has what it needs here."""
    return not missing_for_compiling(device.torch_device.type)


def compiled_loss(model: GPT, extent: Extent, device: Device) -> LossFunction:
    """The model's loss, compiled: all at once, or a block once for all and the rest.

    The model itself stays as it is, so that evaluation and sampling compile nothing.

    Args:
        device: in whose forward_pass the loss is to be computed.

    Returns:
        (inputs, targets), int64 [B, T] each, to the mean loss.
    """
    # By itself the cache does not tell code for one attention kernel from code for another.
    torch.compiler.config.cache_key_tag = ",".join(one.name for one in device.attention)
    if extent == "model":
        return torch.compile(model)
    embed, loss = torch.compile(model.embed), torch.compile(model.loss)
    # Blocks differ in their weights only: the second finds the first one's code.
    blocks = [torch.compile(block) for block in model.transformer.h]

    def by_blocks(inputs: Tensor, targets: Tensor) -> Tensor:
        x = embed(inputs)
        for block in blocks:
            x = block(x)
        return loss(x, targets)

    return by_blocks


def extent_for(
    asked: Literal["auto", "model", "blocks", "false"], device: Device, model: GPT, tokens: int
) -> Extent | None:
    """How much to compile, for the shortest run in all; None for nothing.

    On a CPU blocks start twice as fast and are no slower (benchmarks/results). On a GPU the whole
    model is expected to gain a few per cent for half a minute of compiling: not measured.

    Args:
        asked: what the user wants.
        tokens: that one process takes in the whole run, so that a continued one is compiled alike.
    """
    if asked == "false":
        return None
    if asked != "auto":
        return asked
    if device.torch_device.type == "cpu":
        return "blocks"
    at_half_the_peak = 2 * model.flops_per_token() / (device.peak_flops or 100e12)
    return "blocks" if tokens * at_half_the_peak < _WHOLE_MODEL_PAYS_SECONDS else "model"


def cache_report() -> str:
    """How much compiled code of this process came from the cache."""
    # Importing it fixes the place of the cache.
    from torch._dynamo.utils import counters

    made, found = (counters["aot_autograd"][f"autograd_cache_{one}"] for one in ("miss", "hit"))
    return f"{made} pieces of the model were compiled, {found} came from the cache"
