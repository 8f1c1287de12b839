"""The jobs of training.py that look inside a step; each is a process of its own.

    python -m benchmarks.training_steps JOB JSON

prints what it found, as JSON in its last line.
"""

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.data.windows import micro_batch_sizes
from app.model import gpt
from app.model.gpt import GPT, GPTConfig
from app.train.attention import choose_attention
from app.train.compilation import can_compile, compiled_loss
from app.train.device import Device, choose_device
from app.train.micro_batch import available_bytes, largest_micro_batch, memory_need
from app.train.optimizer import Optimizers, build_optimizers

Loss = Callable[[Tensor, Tensor], Tensor]

# The first that is found in a kernel's name is its class.
CLASSES = {
    "attention backward": r"^(?!.*(triton_|cpp_fused)).*(flash|fmha|sdpa|attention)"
    r".*(bwd|backward|bprop|dot_do_o|convert_dq)",
    "attention forward": r"^(?!.*(triton_|cpp_fused)).*(flash|fmha|sdpa|attention)",
    "cross-entropy, softmax": r"softmax|nll_loss|cross_entropy|logsumexp",
    "casts, copies, padding": r"memcpy|memset|aten::(_to_copy|copy_|clone|fill_|zero_|constant_pad)"
    r"|fused_(_?_to_copy|constant_pad_nd|clone|_)*(_?\d+)?$",
    "matmul": r"gemm|nvjet|cutlass|cublas|wgmma|xmma|splitk|gemv|mkl|aten::(mm|addmm|bmm|linear)$",
    "norms and pointwise": r"triton_|cpp_fused|layer_norm|gelu|elementwise|vectorized|reduce_kernel"
    r"|aten::(add|mul|div|sum|embedding|index|native_layer_norm)",
}


def facts(device: str) -> dict[str, Any]:
    """Versions, the device, and the matrix products it really does in a second."""
    chosen = choose_device(device, "auto", "false")
    on_gpu = chosen.torch_device.type == "cuda"
    size = 8192 if on_gpu else 2048
    products = {}
    for name, dtype in {"bf16": torch.bfloat16, "float32": torch.float32}.items():
        a, b = (torch.randn(size, size, device=chosen.torch_device, dtype=dtype) for _ in "ab")
        seconds = statistics.median(timed(chosen, partial(torch.mm, a, b), 3, 10))
        products[name] = 2 * size**3 / seconds
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "device": chosen.name,
        "device_type": chosen.torch_device.type,
        "precision": chosen.precision,
        "cores": len(os.sched_getaffinity(0)),
        "peak_flops": chosen.peak_flops,
        f"matmul_{size}_flops": products,
        "flops_per_token_124M": meta_model({}).flops_per_token(),
        "can_compile": can_compile(chosen),
        "has_linear_cross_entropy": hasattr(F, "linear_cross_entropy"),
    }


def meta_model(model: dict[str, int]) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(**model))


def wait(device: Device) -> None:
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: Device, job: Callable[[], Any], warm: int, repeats: int) -> list[float]:
    seconds = []
    for _ in range(warm + repeats):
        wait(device)
        started = time.perf_counter()
        job()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return seconds[warm:]


def set_up(spec: dict[str, Any]) -> tuple[Device, GPT, Loss, tuple[Tensor, Tensor]]:
    """Device, model, compiled loss and one micro-batch of random tokens."""
    gpt.VOCAB_MULTIPLE = spec.get("vocab_multiple", gpt.VOCAB_MULTIPLE)
    device = choose_device(
        spec["device"], spec.get("precision", "auto"), spec.get("deterministic", "auto")
    )
    config = GPTConfig(**spec["model"])
    torch.manual_seed(0)
    model = GPT(config).to(device.torch_device)
    if "attention" in spec:
        device = replace(device, attention=(getattr(SDPBackend, spec["attention"]),))
    else:
        device, _ = choose_attention(device, config)
    if spec.get("loss") == "linear_cross_entropy":
        if not hasattr(F, "linear_cross_entropy"):
            raise NotImplementedError("this torch has no linear_cross_entropy")
        model.loss = partial(chunked_loss, model)  # type: ignore[method-assign]
    extent = spec.get("extent", "blocks")
    loss: Loss = compiled_loss(model, extent) if extent else model
    if "mode" in spec:
        loss = torch.compile(model, mode=spec["mode"])
    tokens = torch.randint(
        0, config.vocab_size, (spec["micro_batch"], config.context_length + 1)
    ).to(device.torch_device)
    return device, model, loss, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def chunked_loss(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """torch's own fused head and loss, in the chunks that it chooses itself."""
    hidden = model.transformer.ln_f(x).flatten(0, 1)
    weight = model.transformer.wte.weight
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return F.linear_cross_entropy(hidden, weight, targets.flatten()).float()


def optimizers_of(model: GPT, name: str) -> Optimizers:
    decayed = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    if name == "adamw, foreach":
        return Optimizers(torch.optim.AdamW(model.parameters(), foreach=True, **decayed))
    return build_optimizers(model, name.split(",")[0], **decayed, decay_on="matrices")


def update(model: GPT, optimizers: Optimizers, clip: bool = True) -> None:
    """The end of a step, as in app.train.loop."""
    parameters = list(model.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm.item()
    if clip:
        clip_grads_with_norm_(parameters, 1.0, norm)
    optimizers.step()


def rung(spec: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward pass of one micro-batch, and the optimizer's step where asked for."""
    try:
        device, model, loss, batch = set_up(spec)
        on_gpu = device.torch_device.type == "cuda"
        # As in a step, nothing waits between the micro-batches.
        together = 4 if on_gpu else 1

        def micro_batches(count: int = together) -> None:
            for _ in range(count):
                with device.forward_pass():
                    value = loss(*batch)
                value.backward()

        first = timed(device, partial(micro_batches, 1), 0, 1)[0]
        seconds = timed(device, micro_batches, 2 if on_gpu else 1, spec["repeats"])
        found: dict[str, Any] = {}
        if "optimizer" in spec:
            optimizers = optimizers_of(model, spec["optimizer"])
            update(model, optimizers)
            micro_batches(1)
            update(model, optimizers)
            kind = device.torch_device.type
            need = memory_need(
                model.config, device.precision, kind, compiled=bool(spec.get("extent", "blocks"))
            )
            found["estimated_bytes"] = need.of(spec["micro_batch"])
        with torch.no_grad(), device.forward_pass():
            found["loss"] = model(*batch).item()
    except NotImplementedError as error:
        return {"left_out": str(error)}
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except RuntimeError as error:
        return {"failed": str(error)[:300]}
    each = statistics.median(seconds) / together
    return {
        "ms": 1000 * each,
        "spread_ms": [1000 * min(seconds) / together, 1000 * max(seconds) / together],
        "tokens_per_second": batch[0].numel() / each,
        "first_call_seconds": first,
        "peak_bytes": device.peak_memory_bytes(),
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "precision": device.precision,
        **found,
    }


def micro_batch_choice(spec: dict[str, Any]) -> dict[str, Any]:
    """What `auto` chooses here, and from what."""
    device = choose_device(spec["device"], "auto", "auto")
    config = GPTConfig(**spec["model"])
    sizes = micro_batch_sizes(spec["tokens_per_step"] // config.context_length, 1)
    kind = device.torch_device.type
    need = memory_need(config, device.precision, kind, compiled=can_compile(device))
    chosen = largest_micro_batch(sizes, config.context_length, need, device.torch_device)
    return {
        "auto": chosen,
        "estimated_bytes": need.of(chosen),
        "fixed_bytes": need.fixed,
        "bytes_per_window": need.per_window,
        "available_bytes": available_bytes(device.torch_device),
    }


def optimizer_step(spec: dict[str, Any]) -> dict[str, Any]:
    """The end of a step, on random gradients: norm, clipping, update."""
    device = choose_device(spec["device"], "auto", "auto")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**spec["model"])).to(device.torch_device)
    optimizers = optimizers_of(model, spec["optimizer"])
    gradients = [torch.randn_like(p) for p in model.parameters()]

    def step(clip: bool) -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        if clip:
            update(model, optimizers)
        else:
            optimizers.step()

    whole = timed(device, partial(step, True), 2, spec["repeats"])
    alone = timed(device, partial(step, False), 1, spec["repeats"])
    return {
        "ms": 1000 * statistics.median(alone),
        "with_norm_and_clipping_ms": 1000 * statistics.median(whole),
        "peak_bytes": device.peak_memory_bytes(),
    }


def profile(spec: dict[str, Any]) -> dict[str, Any]:
    """Where the device's time goes in a whole step, by the kernels' names."""
    from torch._inductor import config as inductor

    # So that what was compiled for a CPU has names, too.
    inductor.cpp.enable_kernel_profile = True
    device, model, loss, batch = set_up(spec)
    optimizers = optimizers_of(model, spec["optimizer"])

    def accumulate() -> None:
        for _ in range(spec["accumulation"]):
            with device.forward_pass():
                value = loss(*batch) / spec["accumulation"]
            value.backward()

    parts = {"passes": accumulate, "optimizer": partial(update, model, optimizers)}
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
    total = sum(by_class.values())
    return {
        "step_ms": 1000 * step,
        "step_ms_by_part": {n: 1000 * statistics.median(times) for n, times in seconds.items()},
        "step_ms_under_profiler": 1000 * sum(profiled for _, profiled in tables.values()),
        "tokens_per_second": spec["accumulation"] * batch[0].numel() / step,
        "device_time_ms": total / 1000,
        "share_of_device_time": {name: us / total for name, us in by_class.most_common()},
        "ms": {name: us / 1000 for name, us in by_class.most_common()},
        "idle_share_of_step": 1 - busy / 1e6 / step,
        "idle_share_under_profiler": 1
        - busy / 1e6 / sum(profiled for _, profiled in tables.values()),
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


def loader(spec: dict[str, Any]) -> dict[str, Any]:
    """The share of a real run that waits for its batches; the first step does not count."""
    from app.__main__ import main as run
    from app.data.loader import BatchLoader

    waits: list[float] = []
    next_batch = BatchLoader.next_batch

    def clocked(self: BatchLoader) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        batch = next_batch(self)
        waits.append(time.perf_counter() - started)
        return batch

    BatchLoader.next_batch = clocked  # type: ignore[method-assign]
    code = run(spec["arguments"])
    if code:
        sys.exit(code)
    lines = Path(spec["metrics"]).read_text().splitlines()
    seconds = [json.loads(line)["step_ms"] / 1000 for line in lines]
    in_a_step = len(waits) // len(seconds)
    return {
        "steps": len(seconds) - 1,
        "batches_in_a_step": in_a_step,
        "share_of_step": sum(waits[in_a_step:]) / sum(seconds[1:]),
        "longest_wait_ms": 1000 * max(waits[in_a_step:]),
        "step_ms": 1000 * statistics.median(seconds[1:]),
    }


def ddp(spec: dict[str, Any]) -> dict[str, Any]:
    """A step by one process and by two, each with one core; gradients are averaged once."""
    seconds, losses = {}, {}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            children = [
                Popen(
                    [sys.executable, "-m", "benchmarks.training_steps", "ddp_rank",
                     json.dumps(spec | {"rank": rank, "ranks": ranks, "folder": folder})],
                    stdout=PIPE, text=True,
                )
                for rank in range(ranks)
            ]  # fmt: skip
            printed = [child.communicate()[0] for child in children]
        if any(child.returncode for child in children):
            sys.exit(f"a rank of {ranks} failed")
        found = [json.loads(one.splitlines()[-1]) for one in printed]
        seconds[ranks] = max(one["seconds"] for one in found)
        losses[ranks] = statistics.mean(one["loss"] for one in found)
        reduce_seconds = max(one["all_reduce_seconds"] for one in found)
    return {
        "step_ms": {ranks: 1000 * taken for ranks, taken in seconds.items()},
        "all_reduce_ms": 1000 * reduce_seconds,
        "efficiency": seconds[1] / (2 * seconds[2]),
        "loss_difference": abs(losses[1] - losses[2]),
    }


def ddp_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """One process: its share of the micro-batches, one all-reduce, one update."""
    from torch import distributed

    rank, ranks = spec["rank"], spec["ranks"]
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[rank]])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{spec['folder']}/meeting", rank=rank, world_size=ranks
    )
    device, model, loss, _ = set_up(spec | {"device": "cpu"})
    optimizers = optimizers_of(model, "adamw")
    share = spec["accumulation"] // ranks
    length = model.config.context_length
    tokens = torch.randint(
        0, 50257, (spec["accumulation"], spec["micro_batch"], length + 1),
        generator=torch.Generator().manual_seed(1),
    )[rank * share : (rank + 1) * share]  # fmt: skip
    reducing, losses = [], []

    def step() -> None:
        total = 0.0
        for windows in tokens:
            with device.forward_pass():
                value = loss(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()) / share
            value.backward()
            total += value.item()
        losses.append(total)
        started = time.perf_counter()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= ranks
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))
        reducing.append(time.perf_counter() - started)
        update(model, optimizers)

    step()
    seconds = []
    for _ in range(spec["repeats"]):
        distributed.barrier()
        seconds += timed(device, step, 0, 1)
    distributed.destroy_process_group()
    return {
        "seconds": statistics.median(seconds),
        "all_reduce_seconds": statistics.median(reducing[1:]),
        "loss": losses[-1],
    }


JOBS: dict[str, Callable[[Any], Any]] = {
    job.__name__: job
    for job in (
        facts, rung, micro_batch_choice, optimizer_step, profile, loader, ddp, ddp_rank,
    )
}  # fmt: skip

if __name__ == "__main__":
    print("\n" + json.dumps(JOBS[sys.argv[1]](json.loads(sys.argv[2]))))
