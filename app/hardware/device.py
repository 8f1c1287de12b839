"""The device: which one, in which precision, how deterministic, how fast it could be."""

import math
import os
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from app.containers import expects_gpu, in_container
from app.errors import UserError
from app.formats import plural
from app.hardware.gpus import find_gpu
from app.hardware.proc import cpu_model, peak_resident_bytes

Precision = Literal["bf16", "fp16", "float32", "fp8"]
AutoOrPrecision = Literal["auto", "bf16", "fp16", "float32", "fp8"]

# Compute capability of the first GPUs that multiply in 8-bit floats.
_FP8_CAPABILITY = (8, 9)
# And of the first with tensor cores, for fp16. Of those before them, most of the Pascal generation
# multiply in fp16 at a 64th of float32's rate, and torch.compile supports none.
_FP16_CAPABILITY = (7, 0)


@dataclass(frozen=True)
class Device:
    """The device that computes the model, and how it does so.

    Attributes:
        torch_device: cpu, cuda:N or mps
        name: as its maker gives it
        precision: precision of matrix products and activations; weights stay float32. fp16
            needs app.train.loss_scale; fp8 is bf16 with the output layer's products in 8-bit floats
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
        """Return the dtype of activations."""
        dtypes = {"float32": torch.float32, "fp16": torch.float16}
        return dtypes.get(self.precision, torch.bfloat16)

    def forward_pass(self) -> torch.autocast:
        """Return the context in which the forward pass runs."""
        device_type = self.torch_device.type
        if self.precision == "float32":
            return torch.autocast(device_type, torch.bfloat16, enabled=False)
        return torch.autocast(device_type, self.dtype)

    @property
    def float64_device(self) -> torch.device:
        """Return where to sum in float64, which Apple's GPU does not have."""
        return torch.device("cpu") if self.torch_device.type == "mps" else self.torch_device

    def memory_bytes(self) -> int | None:
        """Return the memory of a GPU; None for a CPU, which shares its memory with others.

        On a Mac that is the part of main memory that Metal recommends.
        """
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        if self.torch_device.type == "mps":
            return torch.mps.recommended_max_memory()
        return None

    def metadata(self) -> dict[str, Any]:
        """Return the description that settings.json keeps of the device."""
        cuda = torch.version.cuda if self.torch_device.type == "cuda" else None
        return {
            "name": self.name,
            "memory_bytes": self.memory_bytes(),
            "precision": self.precision,
            "cuda": cuda,
        }

    def peak_memory_bytes(self) -> int:
        """Return the most memory in use so far; 0 if unknown.

        On a GPU that is what torch has allocated (Apple's tells only what it has now), on a CPU the
        process's resident memory.
        """
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        if self.torch_device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return peak_resident_bytes()


def select_device(
    device: Literal["auto", "cpu", "cuda", "mps"],
    precision: AutoOrPrecision,
    deterministic: Literal["auto", "true", "false"],
    local_rank: int = 0,
) -> Device:
    """Select the device and set torch up for it.

    Args:
        device: auto for a GPU if there is one.
        precision: auto for the fastest that the device has units for: bf16, else fp16, else
            float32.
        deterministic: auto for true on a CPU only.
        local_rank: index of this process on its machine, and of its GPU.

    Raises:
        UserError: there is no such device here, or it lacks the precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        raise UserError(
            f"TRAIN_DEVICE=cuda, but no GPU can be used here (this torch is built for {build})",
            "check `nvidia-smi`, or set TRAIN_DEVICE=auto to use the CPU",
        )
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if device == "mps" or (device == "auto" and not on_gpu and torch.backends.mps.is_available()):
        return _apple_gpu(precision, deterministic)
    if on_gpu:
        torch.cuda.set_device(local_rank)
        # A GPU that torch was not built for fails here, before anything has been started.
        torch.ones(1, device="cuda").cpu()
    if device == "auto" and not on_gpu and expects_gpu() and torch.version.cuda:
        where = " on the host" if in_container() else ""
        raise UserError(
            f"this {'container was given' if where else 'machine has'} a GPU, but torch, built for "
            f"CUDA {torch.version.cuda}, cannot use it",
            f"check `nvidia-smi` and the driver's version{where}, or set TRAIN_DEVICE=cpu",
        )
    is_deterministic = not on_gpu if deterministic == "auto" else deterministic == "true"
    if is_deterministic:
        # cuBLAS reads this when it is first used; without it torch refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch.use_deterministic_algorithms would also import Inductor to set its flag, which takes a
    # second; compiled_loss sets it.
    torch.set_deterministic_debug_mode("error" if is_deterministic else "default")
    if not on_gpu:
        selected = _cpu_precision(precision)
        name = f"CPU ({cpu_model()}, {plural(torch.get_num_threads(), 'thread')})"
        return Device(torch.device("cpu"), name, selected, is_deterministic, None)
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention, torch's choice on Hopper, has no deterministic backward pass.
    torch.backends.cuda.enable_cudnn_sdp(not is_deterministic)
    name = torch.cuda.get_device_name()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = torch.cuda.get_device_capability()
    selected = gpu_precision(precision, name, capability, has_bf16=has_bf16)
    gpu = find_gpu(name)
    peak_flops = gpu.flops if gpu else None
    if gpu and selected == "float32":
        peak_flops = gpu.flops * gpu.float32_share
    here = torch.device("cuda", torch.cuda.current_device())
    return Device(here, name, selected, is_deterministic, peak_flops)


def _apple_gpu(
    precision: AutoOrPrecision, deterministic: Literal["auto", "true", "false"]
) -> Device:
    """Return Apple's GPU. Untried: no such machine was at hand."""
    if not torch.backends.mps.is_available():
        raise UserError(
            "TRAIN_DEVICE=mps, but no GPU of Apple can be used here",
            "it takes a Mac with Apple silicon and macOS 14; set TRAIN_DEVICE=auto elsewhere",
        )
    if deterministic == "true":
        raise UserError(
            "TRAIN_DETERMINISTIC=true, but torch has no deterministic algorithms for Apple's GPU",
            "set TRAIN_DETERMINISTIC=auto, or TRAIN_DEVICE=cpu",
        )
    if precision == "fp8":
        raise _lacks_precision(precision, "Apple's GPU")
    # 16 bits are no faster there (karpathy/nanochat, pull request 244), and need more of torch.
    selected: Precision = "float32" if precision == "auto" else precision
    return Device(torch.device("mps"), f"Apple GPU ({cpu_model()})", selected, False, None)


def matmul_flops(device: Device, side: int = 512) -> float | None:
    """Measure matrix products on a CPU in a few milliseconds, FLOP/s; None for a GPU."""
    if device.torch_device.type != "cpu":
        return None
    matrix, seconds = torch.ones(side, side, dtype=device.dtype), math.inf
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        seconds = min(seconds, time.perf_counter() - started)
    return 2 * side**3 / seconds


def gpu_precision(
    precision: AutoOrPrecision, name: str, capability: tuple[int, int], *, has_bf16: bool
) -> Precision:
    """Return the precision of a GPU of NVIDIA; UserError if it lacks the requested one.

    Args:
        capability: its compute capability.
        has_bf16: whether it has units for bf16.
    """
    if precision == "auto":
        return "bf16" if has_bf16 else "fp16" if capability >= _FP16_CAPABILITY else "float32"
    if not {"bf16": has_bf16, "fp8": capability >= _FP8_CAPABILITY}.get(precision, True):
        raise _lacks_precision(precision, name)
    return precision


def _cpu_precision(precision: AutoOrPrecision) -> Precision:
    """Return the precision of a CPU, which computes in 16 bits without units for it too, slowly."""
    if precision == "auto":
        return "bf16" if _multiplies_faster_in_bf16() else "float32"
    if precision == "fp8":
        raise _lacks_precision(precision, "a CPU")
    return precision


def _lacks_precision(precision: str, name: str) -> UserError:
    return UserError(
        f"TRAIN_PRECISION={precision}, but {name} does not compute in it",
        "set TRAIN_PRECISION=auto (bf16 takes an NVIDIA GPU of the Ampere generation or newer, "
        "fp8 one of the Ada or Hopper generation)",
    )


def _multiplies_faster_in_bf16() -> bool:
    """Return True if this CPU multiplies matrices much faster in bf16 than in float32.

    Measured in a few milliseconds, because units alone tell too little: with AVX512-BF16 the ratio
    is 3.7 on one CPU, and 0.5 on a Sapphire Rapids whose AMX its virtual machine hides; with AMX it
    is higher, without such units below 0.8.
    """
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fastest = [math.inf, math.inf]
    threads = torch.get_num_threads()
    # With one thread and in turns, other programs leave some rounds undisturbed.
    torch.set_num_threads(1)
    for _ in range(8):
        for index, matrix in enumerate(matrices):
            started = time.perf_counter()
            matrix @ matrix
            fastest[index] = min(fastest[index], time.perf_counter() - started)
    torch.set_num_threads(threads)
    return fastest[0] > 1.5 * fastest[1]
