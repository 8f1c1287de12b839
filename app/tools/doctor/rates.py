"""How fast a device multiplies and copies, against its data sheet."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from app.tools.doctor.device_checks import Examined
from app.tools.doctor.finding import Finding, gigabytes

# Bytes/s of data sheets, the slowest variant of each. The first name that is part counts.
_MEMORY_RATES = {
    "B200": 8.0e12,
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100": 1.555e12,
    "L40S": 0.864e12,
    "L40": 0.864e12,
    "L4": 0.3e12,
    "A10G": 0.6e12,
    "RTX 5090": 1.79e12,
    "RTX 4090": 1.01e12,
    "RTX 3090": 0.936e12,
}
# Large products are expected to reach 0.6 to 0.9 of a data sheet's rate, copies 0.8 to 0.9; far
# below, heat, the power supply or somebody else slows the device.
_LEAST_OF_PEAK = 0.4
_LEAST_OF_MEMORY_RATE = 0.6
_SLOW = "look at `nvidia-smi -q -d PERFORMANCE`; if it stays so slow, take another machine"
_MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_MEASURED_SECONDS = 0.5


def check_matmul(case: Examined) -> Iterator[Finding]:
    """The rate of large matrix products in the precision of training."""
    for device in case.all_alike:
        side = _MATRIX_SIDE[device.type]
        a = torch.randn(side, side, device=device, dtype=case.device.dtype)
        rate = 2 * side**3 / _fastest(partial(torch.matmul, a, a), device)
        if device == case.device.torch_device:
            case.trial = replace(case.trial, matmul_flops=rate)
        said = f"{_shown(device)}{rate / 1e12:.3g} TFLOP/s in {case.device.precision}"
        peak = case.device.peak_flops if case.device.precision == "bf16" else None
        yield _against("matmul", said, rate, peak, _LEAST_OF_PEAK)


def check_copies(case: Examined) -> Iterator[Finding]:
    """The rate of the device's memory, and of the way to it from the machine's."""
    for device in case.all_alike:
        data = torch.zeros(_COPIED_BYTES[device.type] // 4, device=device)
        copy = torch.zeros_like(data)
        # Each byte is read and written.
        rate = 2 * data.nbytes / _fastest(partial(copy.copy_, data), device)
        said = f"{_shown(device)}{gigabytes(rate)}/s within memory"
        if device.type == "cuda":
            pinned = torch.zeros(data.numel() // 4, pin_memory=True)
            part = data[: pinned.numel()]
            seconds = _fastest(partial(part.copy_, pinned), device)
            said += f", {gigabytes(pinned.nbytes / seconds)}/s from the machine's"
        known = (rate for name, rate in _MEMORY_RATES.items() if _is_part(name, case.device.name))
        yield _against("copies", said, rate, next(known, None), _LEAST_OF_MEMORY_RATE)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until a device has done some work."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several; one before them prepares."""
    timed(work, device)
    spent = [timed(work, device)]
    while sum(spent) < _MEASURED_SECONDS:
        spent.append(timed(work, device))
    return min(spent)


def _against(check: str, said: str, rate: float, known: float | None, least: float) -> Finding:
    if known is None:
        return Finding(check, "pass", f"{said}; not compared: this device is in no table of peaks")
    said += f", {rate / known:.0%} of its data sheet's rate"
    if rate < least * known:
        return Finding(check, "warn", f"{said}; {least:.0%} and more are usual", _SLOW)
    return Finding(check, "pass", said)


def _is_part(name: str, full_name: str) -> bool:
    return re.search(rf"\b{name}\b", full_name) is not None


def _shown(device: torch.device) -> str:
    return f"GPU {device.index}: " if device.type == "cuda" else ""
