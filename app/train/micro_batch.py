"""The micro-batch: as many windows as fit into memory and make training faster."""

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from app.hardware.device import Precision
from app.model.gpt import GPT, GPTConfig

# More tokens at once do not make a device faster at GPT-2's size: on an H100, 469k tokens/s with
# 32,768 and 467k with 65,536.
_SATURATING_TOKENS = {"cuda": 32_768, "cpu": 4_096}
# The allocator's gaps, the libraries' workspaces, whatever else runs on the machine.
_USABLE = 0.85
_LIBRARIES_BYTES = {"cuda": 1_500_000_000, "cpu": 500_000_000}
# Limit and use of control groups, version 2 and 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Logits and their gradients. Compiled for a GPU they share their memory, and fp8 adds two copies;
# compiled for a CPU there are both, and room for a third; uncompiled, float32 copies of each.
_BYTES_PER_LOGIT = {
    "cuda": {"bf16": 2, "fp8": 4, "float32": 4},
    "cpu": {"bf16": 6, "float32": 12},
    "uncompiled": {"bf16": 14, "fp8": 14, "float32": 16},
}
# A weight and its gradient, in float32; on the CPU is also the snapshot that a checkpoint is
# written from, of the weight and its state.
_BYTES_PER_PARAMETER = {"cuda": 8, "cpu": 20}
# Two moments.
_BYTES_OF_ITS_STATE = 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes at most: `fixed`, and `per_window` for each window at once."""

    fixed: int
    per_window: int

    def of(self, windows: int) -> int:
        """Bytes with micro-batches of so many windows."""
        return self.fixed + windows * self.per_window


def estimate_memory(
    config: GPTConfig,
    precision: Precision,
    device_type: str,
    *,
    compiled: bool,
    bf16_residual: bool = False,
    state_shards: int = 1,
) -> MemoryEstimate:
    """Count what the backward pass keeps, without computing anything.

    The blocks are counted as uncompiled code keeps them; compiled code keeps less of them, so that
    this is an upper bound.

    Args:
        state_shards: processes that share out the optimizer's state, whole parameters to each.
    """
    with FakeTensorMode():
        model = GPT(config, bf16_residual=bf16_residual)
        one, two = (_activation_bytes(model, precision, windows) for windows in (1, 2))
    parameters = model.num_parameters()
    # One shard may be larger than another by the largest parameter, the embedding.
    of_a_shard = parameters // state_shards + config.vocab_size * config.embd_size
    fixed = _BYTES_PER_PARAMETER[device_type] * parameters + (2 * one - two)
    fixed += _BYTES_OF_ITS_STATE * min(parameters, of_a_shard)
    logits = config.context_length * config.vocab_size
    head = _BYTES_PER_LOGIT[device_type if compiled else "uncompiled"][precision] * logits
    return MemoryEstimate(fixed + _LIBRARIES_BYTES[device_type], two - one + head)


def _activation_bytes(model: GPT, precision: Precision, windows: int) -> int:
    """Count the bytes that backward needs of the embedding and the blocks, without the head."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            # With the tensor itself, so that no later storage gets its number.
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"),
    ):
        x = model.embed(torch.zeros(windows, model.config.context_length, dtype=torch.int64))
        for block in model.transformer.h:
            x = block(x)
    return sum(size for _, size in kept.values())


def largest_batch_that_fits(
    sizes: list[int],
    context_length: int,
    need: MemoryEstimate,
    device: torch.device,
    processes: int = 1,
) -> int:
    """The largest of `sizes`, in windows, that fits and helps; the smallest if none does.

    Args:
        processes: of this machine; each has a GPU of its own, but they share the CPU's memory.
    """
    useful = [size for size in sizes if size * context_length <= _SATURATING_TOKENS[device.type]]
    shares = processes if device.type == "cpu" else 1
    usable = _USABLE * available_bytes(device) / shares
    return max((size for size in useful if need.of(size) <= usable), default=sizes[0])


def available_bytes(device: torch.device) -> int:
    """Return the bytes of the device's memory that this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_on_the_machine(), *_left_of_limits(), *_left_of_cgroups())


def _free_on_the_machine() -> int:
    found = _numbers(Path("/proc/meminfo"))
    return found["MemAvailable:"] << 10 if found else sys.maxsize


def _left_of_limits() -> Iterator[int]:
    used = _numbers(Path("/proc/self/status"))
    for limit, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY:
            yield max(0, allowed - (used.get(name, 0) << 10))


def _left_of_cgroups() -> Iterator[int]:
    """Yield what is left of this process's control group, and of those that contain it."""
    root = Path("/sys/fs/cgroup")
    own = Path("/proc/self/cgroup")
    groups = own.read_text().splitlines() if own.exists() else []
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        group = top / name.strip("/")
        # A container may see the name that its host has for the group, and the group at the top.
        for folder in (group, *group.parents):
            if top in (folder, *folder.parents):
                yield from _left_of_cgroup(folder)


def _left_of_cgroup(folder: Path) -> Iterator[int]:
    for limit, used in _CGROUP_FILES:
        allowed, taken = (_number(folder / file) for file in (limit, used))
        if allowed is not None and taken is not None:
            cached = _numbers(folder / "memory.stat").get("inactive_file", 0)
            yield max(0, allowed - taken + cached)


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name, a number and perhaps a unit."""
    lines = path.read_text().splitlines() if path.exists() else []
    words = [line.split() for line in lines]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
