"""Measurements: how fast a device multiplies, copies and trains, and if compiled code runs."""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from app.model.gpt import GPT
from app.tools.doctor.device_checks import Examined
from app.tools.doctor.finding import Finding, gigabytes
from app.train.compile import compile_cache_summary, compiled_loss, missing_build_tools
from app.train.optimizer import build_optimizers

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
_MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_MEASURED_SECONDS = 0.5
_TRAINING_SECONDS = 1.0
# More tokens at once would only take longer on a CPU.
_TOKENS_ON_CPU = 1024
# Nats per token: compiled and plain code round differently, in bf16 visibly.
_TOLERANCE = 0.05


def check_matmul(case: Examined) -> Iterator[Finding]:
    """Measure large matrix products in the precision of the blocks."""
    precision = "bf16" if case.device.precision == "fp8" else case.device.precision
    for device in case.all_alike:
        side = _MATRIX_SIDE[device.type]
        a = torch.randn(side, side, device=device, dtype=case.device.dtype)
        rate = 2 * side**3 / _fastest(partial(torch.matmul, a, a), device)
        if device == case.device.torch_device:
            case.trial.matmul_flops = rate
        said = f"{_shown(device)}{rate / 1e12:.3g} TFLOP/s in {precision}"
        yield _against("matmul", said, rate, case.device.peak_flops, _LEAST_OF_PEAK)


def check_copies(case: Examined) -> Iterator[Finding]:
    """The rate of the device's memory, and of the way to it from the machine's."""
    names = (name for name in _MEMORY_RATES if re.search(rf"\b{name}\b", case.device.name))
    known = _MEMORY_RATES.get(next(names, ""))
    for device in case.all_alike:
        data = torch.zeros(_COPIED_BYTES[device.type] // 4, device=device)
        copy = torch.zeros_like(data)
        # Each byte is read and written.
        rate = 2 * data.nbytes / _fastest(partial(copy.copy_, data), device)
        said = f"{_shown(device)}{gigabytes(rate)}/s within memory"
        if device.type == "cuda":
            pinned = torch.zeros(data.numel() // 4, pin_memory=True)
            seconds = _fastest(partial(data[: pinned.numel()].copy_, pinned), device)
            said += f", {gigabytes(pinned.nbytes / seconds)}/s from the machine's"
        yield _against("copies", said, rate, known, _LEAST_OF_MEMORY_RATE)


def _against(check: str, said: str, rate: float, known: float | None, least: float) -> Finding:
    if known is None:
        return Finding(check, "pass", f"{said}; not compared: this device is in no table of peaks")
    said += f", {rate / known:.0%} of its data sheet's rate"
    if rate < least * known:
        fix = "look at `nvidia-smi -q -d PERFORMANCE`; if it stays so slow, take another machine"
        return Finding(check, "warn", f"{said}; {least:.0%} and more are usual", fix)
    return Finding(check, "pass", said)


def _shown(device: torch.device) -> str:
    return f"GPU {device.index}: " if device.type == "cuda" else ""


def check_compilation(case: Examined) -> Iterator[Finding]:
    """Check that the compiled model runs here, and gives the plain model's loss.

    Without a compiler the plain model is measured.
    """
    if case.trial.device_type == "cuda":
        torch.cuda.empty_cache()
    missing = missing_build_tools(case.trial.device_type)
    if not case.settings.train.compile:
        yield Finding("compile", "skip", "not needed: TRAIN_COMPILE=false")
        _train_a_little(case, compiled=False)
    elif missing:
        said = f"torch.compile does not find {' and '.join(missing)}: training would be slower"
        fix = "install it, or set TRAIN_COMPILE=false"
        yield Finding("compile", "fail", said, fix)
        _train_a_little(case, compiled=False)
    else:
        plain, found = _train_a_little(case, compiled=True)
        said = (
            f"{compile_cache_summary()}, in {case.trial.compile_seconds:.0f} s; loss {found:.4f}, "
            f"{plain:.4f} without compiling"
        )
        # NaN is within no tolerance.
        if abs(found - plain) < _TOLERANCE:
            yield Finding("compile", "pass", said)
        else:
            fix = "set TRAIN_COMPILE=false; if the losses differ then as well, change the machine"
            yield Finding("compile", "fail", said, fix)


def _train_a_little(case: Examined, *, compiled: bool) -> tuple[float, float]:
    """Losses of a batch, plain and as train computes it; measures passes and updates."""
    config, here, windows = case.model.config, case.device.torch_device, case.windows
    if here.type == "cpu":
        windows = min(windows, max(1, _TOKENS_ON_CPU // config.context_length))
    torch.manual_seed(0)
    with here:
        model = GPT(config, bf16_residual=case.model.bf16_residual)
    tokens = torch.randint(config.vocab_size, (windows, config.context_length + 1), device=here)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with torch.no_grad(), case.device.forward_pass():
        # One after the other: uncompiled, logits take more than train counts on.
        of_windows = [model(x[None], y[None]) for x, y in zip(inputs, targets, strict=True)]
        plain = torch.stack(of_windows).mean().item()
    optimizers = build_optimizers(model, case.settings.train, case.device.dtype)
    loss_of = compiled_loss(model, case.device) if compiled else model

    def passes() -> float:
        with case.device.forward_pass():
            loss = loss_of(inputs, targets)
        loss.backward()
        return float(loss.item())

    started = time.perf_counter()
    found = passes()
    if compiled:
        case.trial.compile_seconds = time.perf_counter() - started
    # The first update also takes the memory for the moments.
    optimizers.step()
    of_passes: list[float] = []
    of_updates: list[float] = []
    while sum(of_passes) + sum(of_updates) < _TRAINING_SECONDS:
        of_passes.append(_timed(passes, here))
        of_updates.append(_timed(optimizers.step, here))
    case.trial.micro_batch_seconds = statistics.median(of_passes)
    case.trial.optimizer_seconds = statistics.median(of_updates)
    case.trial.micro_batch_tokens = inputs.numel()
    return plain, found


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until a device has done some work."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several; one before them prepares."""
    _timed(work, device)
    spent = [_timed(work, device)]
    while sum(spent) < _MEASURED_SECONDS:
        spent.append(_timed(work, device))
    return min(spent)
