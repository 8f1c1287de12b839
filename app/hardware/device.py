"""The device: which one, in which precision, how deterministic, how fast it could be."""

import math
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from app.containers import expects_gpu
from app.errors import UserError

Precision = Literal["bf16", "float32", "fp8"]

# Dense bf16 FLOP/s of data sheets. The first name that is part of the device's name counts.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


# Compute capability of the first cards that multiply in 8-bit floats.
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Device:
    """Where and how the model is computed.

    Attributes:
        torch_device: cpu or cuda:N
        name: as its maker calls it
        precision: of matrix products and activations; weights stay float32. fp8 is bf16 with the
            output layer's products in 8-bit floats
        deterministic: only algorithms that give the same bits every time
        peak_flops: dense FLOP/s of the data sheet in this precision; None if unknown
    """

    torch_device: torch.device
    name: str
    precision: Precision
    deterministic: bool
    peak_flops: float | None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Enter the context in which the forward pass runs."""
        is_bf16 = self.dtype == torch.bfloat16
        with torch.autocast(self.torch_device.type, torch.bfloat16, enabled=is_bf16):
            yield

    def memory_bytes(self) -> int | None:
        """Memory that a GPU has; None for a CPU, whose memory others use as well."""
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        return None

    def facts(self) -> dict[str, Any]:
        """Return the facts that settings.json keeps of the device."""
        cuda = torch.version.cuda if self.torch_device.type == "cuda" else None
        return {
            "name": self.name,
            "memory_bytes": self.memory_bytes(),
            "precision": self.precision,
            "cuda": cuda,
        }

    def peak_memory_bytes(self) -> int:
        """Most memory in use so far: the GPU's allocations, or the process's resident memory.

        0 where the system does not tell.
        """
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        return _most_resident_bytes()


def select_device(
    device: Literal["auto", "cpu", "cuda"],
    precision: Literal["auto", "bf16", "float32", "fp8"],
    deterministic: Literal["auto", "true", "false"],
    local_rank: int = 0,
) -> Device:
    """Choose the device and set torch up for it.

    Args:
        local_rank: number of this process on its machine, and of its GPU.

    Raises:
        UserError: there is no such device here, or it lacks the precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        built = f"this torch is built for CUDA {torch.version.cuda}"
        raise UserError(
            "TRAIN_DEVICE=cuda, but no GPU can be used here "
            f"({built if torch.version.cuda else 'this torch is built for the CPU only'})",
            "check `nvidia-smi`, or set TRAIN_DEVICE=auto to use the CPU",
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if device == "auto" and not on_gpu and expects_gpu() and torch.version.cuda:
        raise UserError(
            "this container was given a GPU, but torch, built for CUDA "
            f"{torch.version.cuda}, cannot use it",
            "check `nvidia-smi` and the driver's version on the machine outside, "
            "or set TRAIN_DEVICE=cpu",
        )
    chosen = _choose_precision(precision, on_gpu=on_gpu)
    is_deterministic = not on_gpu if deterministic == "auto" else deterministic == "true"
    if is_deterministic:
        # cuBLAS reads this when it is first used; without it torch refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch.use_deterministic_algorithms would also import Inductor to set its flag, which takes a
    # second; compiled_loss sets it.
    torch.set_deterministic_debug_mode("error" if is_deterministic else "default")
    if not on_gpu:
        return Device(torch.device("cpu"), _cpu_name(), chosen, is_deterministic, None)
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention, torch's choice on Hopper, has no deterministic backward pass.
    torch.backends.cuda.enable_cudnn_sdp(not is_deterministic)
    name = torch.cuda.get_device_name()
    peak = next(
        (flops for part, flops in _PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None
    )
    here = torch.device("cuda", torch.cuda.current_device())
    if peak and chosen == "float32":
        # Matrix products are in TF32, which is half as fast on all of them.
        peak /= 2
    return Device(here, name, chosen, is_deterministic, peak)


def _choose_precision(
    precision: Literal["auto", "bf16", "float32", "fp8"], *, on_gpu: bool
) -> Precision:
    if on_gpu:
        name = torch.cuda.get_device_name()
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        has_fp8 = torch.cuda.get_device_capability() >= _FP8_CAPABILITY
    else:
        name, has_fp8 = "a CPU", False
        # Without units for it a CPU computes in bf16 too, only slowly.
        has_bf16 = precision == "bf16" or (precision == "auto" and _multiplies_faster_in_bf16())
    if precision == "auto":
        return "bf16" if has_bf16 else "float32"
    if not {"bf16": has_bf16, "fp8": has_fp8, "float32": True}[precision]:
        raise UserError(
            f"TRAIN_PRECISION={precision}, but {name} does not compute in it",
            "set TRAIN_PRECISION=auto (bf16 takes an NVIDIA GPU of the Ampere generation or newer, "
            "fp8 one of the Ada or Hopper generation)",
        )
    return precision


def _multiplies_faster_in_bf16() -> bool:
    """Return True if this CPU multiplies matrices much faster in bf16 than in float32.

    Measured in a few milliseconds: with AVX512-BF16 the ratio is 3.7, with AMX higher, without such
    units below 0.8.
    """
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fastest = [math.inf, math.inf]
    threads = torch.get_num_threads()
    # One thread, in turns: whatever else the machine does, some rounds are undisturbed.
    torch.set_num_threads(1)
    for _ in range(8):
        for number, matrix in enumerate(matrices):
            started = time.perf_counter()
            matrix @ matrix
            fastest[number] = min(fastest[number], time.perf_counter() - started)
    torch.set_num_threads(threads)
    return fastest[0] > 1.5 * fastest[1]


def _most_resident_bytes() -> int:
    # Not getrusage: its figure starts with that of the process which started this one.
    path = Path("/proc/self/status")
    status = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", known, re.MULTILINE)
    name = model[1].strip() if model else platform.machine()
    return f"CPU ({name}, {torch.get_num_threads()} threads)"
