"""The jobs of training.py that look inside a step; each is a process of its own.

    python -m benchmarks.training_steps JOB JSON

prints what it found, as JSON in its last line.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.data.windows import micro_batch_sizes
from app.model.gpt import GPT, GPTConfig
from app.train.compilation import can_compile
from app.train.device import choose_device
from app.train.micro_batch import available_bytes, largest_micro_batch, memory_need
from benchmarks.training_profile import profile
from benchmarks.training_setup import meta_model, optimizers_of, set_up, timed, update


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
            optimizers = optimizers_of(model, spec["optimizer"], device)
            update(model, optimizers)
            micro_batches(1)
            update(model, optimizers)
            kind = device.torch_device.type
            need = memory_need(
                model.config, device.precision, kind, compiled=spec.get("compile", True)
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
    optimizers = optimizers_of(model, spec["optimizer"], device)
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
    optimizers = optimizers_of(model, "adamw", device)
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
