"""What looks inside a step needs: the default recipe's model, an update, a clock, this machine."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.hardware.device import Device, select_device
from app.model.gpt import GPT, GPTConfig
from app.runs.code import git_revision
from app.train.optimizer import Optimizers


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


def model_and_batch(
    spec: dict[str, Any], device: Device, windows: int
) -> tuple[GPT, tuple[Tensor, Tensor]]:
    """A GPT with the default recipe's residual stream, and random (inputs, targets)."""
    config = GPTConfig(**spec["model"])
    torch.manual_seed(0)
    model = GPT(config, bf16_residual=True).to(device.torch_device)
    tokens = torch.randint(config.vocab_size, (windows, config.context_length + 1))
    tokens = tokens.to(device.torch_device)
    return model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def update(model: GPT, optimizers: Optimizers) -> None:
    """The end of a step, as in app.train.loop."""
    parameters = list(model.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm.item()
    clip_grads_with_norm_(parameters, 1.0, norm)
    optimizers.step()


def machine(spec: dict[str, Any]) -> dict[str, Any]:
    """Versions, the device, and the matrix products it really does in a second."""
    device = select_device(spec["device"], "auto", "false")
    on_gpu = device.torch_device.type == "cuda"
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device.torch_device, dtype=device.dtype) for _ in "ab")
    seconds = statistics.median(timed(device, partial(torch.mm, a, b), 3, 10))
    # Whatever the compiler reads from a cold disk, no process that is measured waits for.
    torch.compile(lambda x: F.gelu(x).sum())(a.requires_grad_()).backward()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    has_tool = shutil.which(query[0]) is not None
    driver = subprocess.check_output(query, text=True).split()[0] if has_tool else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_revision(),
        "device": device.name,
        "precision": device.precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "driver": driver,
        "cores": len(os.sched_getaffinity(0)),
        "matmul_flops": 2 * size**3 / seconds,
    }


if __name__ == "__main__":
    print(json.dumps(machine(json.loads(sys.argv[1]))))
