"""Where the time of a step goes: kernels by class."""

import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType

from app.hardware.device import Device, select_device
from app.settings.train import TrainSettings
from app.train.compile import compiled_loss
from app.train.optimizer import build_optimizers
from benchmarks.training_setup import model_and_batch, timed, update, wait

# The first that is found in a kernel's name is its class.
CLASSES = {
    "attention, cuDNN's helpers": r"dot_do_o|convert_dq",
    "attention backward": r"^(?!.*(triton_|cpp_fused)).*(flash|fmha|sdpa|attention)"
    r".*(bwd|backward|bprop)",
    "attention forward": r"^(?!.*(triton_|cpp_fused)).*(flash|fmha|sdpa|attention)",
    "cross-entropy, softmax": r"softmax|nll_loss|cross_entropy|logsumexp",
    "casts, copies, padding": r"memcpy|memset|aten::(_to_copy|copy_|clone|fill_|zero_|constant_pad)"
    r"|fused_(_?_to_copy|constant_pad_nd|clone|_)*(_?\d+)?$",
    "matmul": r"gemm|nvjet|cutlass|cublas|wgmma|xmma|splitk|gemv|mkl|aten::(mm|addmm|bmm|linear)$",
    "norms and pointwise": r"triton_|cpp_fused|layer_norm|gelu|elementwise|vectorized|reduce_kernel"
    r"|aten::(add|mul|div|sum|embedding|index|native_layer_norm)",
}


def profile(spec: dict[str, Any]) -> dict[str, Any]:
    """Where the device's time goes in a step of the default recipe, by the kernels' names."""
    from torch._inductor import config as inductor

    # So that what was compiled for a CPU has names, too.
    inductor.cpp.enable_kernel_profile = True
    device = select_device(spec["device"], "auto", "auto")
    model, batch = model_and_batch(spec, device, spec["micro_batch"])
    loss = compiled_loss(model, device)
    optimizers = build_optimizers(model, TrainSettings(), device.dtype)
    accumulation = spec["sequences_per_step"] // spec["micro_batch"]

    def accumulate() -> None:
        for _ in range(accumulation):
            with device.forward_pass():
                value = loss(*batch) / accumulation
            value.backward()

    parts: dict[str, Callable[[], None]] = {
        "passes": accumulate,
        "optimizer": partial(update, model, optimizers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(2 + spec["repeats"]):
        for name, part in parts.items():
            taken = timed(device, part, 0, 1)
            seconds[name] += taken if repeat >= 2 else []
    tables = {}
    for name, part in parts.items():
        with torch.profiler.profile() as profiler:
            started = time.perf_counter()
            part()
            wait(device)
            profiled = time.perf_counter() - started
        tables[name] = (reduced(profiler, device), profiled)

    step = sum(statistics.median(times) for times in seconds.values())
    by_class: Counter[str] = Counter()
    for name, (table, _) in tables.items():
        for kernel, (microseconds, _) in table["kernels"].items():
            by_class["optimizer" if name == "optimizer" else class_of(kernel)] += microseconds
    busy = sum(table["busy_us"] for table, _ in tables.values())
    return {
        "step_ms": 1000 * step,
        "step_ms_by_part": {n: 1000 * statistics.median(times) for n, times in seconds.items()},
        "step_ms_under_profiler": 1000 * sum(profiled for _, profiled in tables.values()),
        "tokens_per_second": accumulation * batch[0].numel() / step,
        "ms": {name: us / 1000 for name, us in by_class.most_common()},
        "idle_share_of_step": 1 - busy / 1e6 / step,
        "longest": {
            name: [
                {"kernel": k[:160], "class": class_of(k), "ms": us / 1000, "calls": calls}
                for k, (us, calls) in sorted(table["kernels"].items(), key=lambda i: -i[1][0])[:25]
            ]
            for name, (table, _) in tables.items()
        },
    }


def reduced(profiler: torch.profiler.profile, device: Device) -> dict[str, Any]:
    """Microseconds and calls of each kernel, and how long at least one of them ran."""
    if device.torch_device.type == "cpu":
        table = {
            event.key: (event.self_cpu_time_total, event.count)
            for event in profiler.key_averages()
            if event.device_type == DeviceType.CPU
        }
        return {"kernels": table, "busy_us": sum(us for us, _ in table.values())}
    kernels: dict[str, tuple[float, int]] = {}
    spans = []
    for event in profiler.events() or ():
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        start, end = event.time_range.start, event.time_range.end
        spans.append((start, end))
        us, calls = kernels.get(event.name, (0.0, 0))
        kernels[event.name] = us + end - start, calls + 1
    busy = reached = 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"kernels": kernels, "busy_us": busy}


def class_of(kernel: str) -> str:
    return next(
        (name for name, pattern in CLASSES.items() if re.search(pattern, kernel, re.IGNORECASE)),
        "other",
    )


if __name__ == "__main__":
    print("\n" + json.dumps(profile(json.loads(sys.argv[1]))))
