"""What the jobs of training_steps.py share: a model to take steps with, an update, a clock."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.model import gpt
from app.model.gpt import GPT, GPTConfig
from app.train.compilation import compiled_loss
from app.train.device import Device, choose_device
from app.train.optimizer import Optimizers, build_optimizers

Loss = Callable[[Tensor, Tensor], Tensor]


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
    if spec.get("loss") == "linear_cross_entropy":
        if not hasattr(F, "linear_cross_entropy"):
            raise NotImplementedError("this torch has no linear_cross_entropy")
        model.loss = partial(chunked_loss, model)  # type: ignore[method-assign]
    loss: Loss = compiled_loss(model, device) if spec.get("compile", True) else model
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


def optimizers_of(model: GPT, name: str, device: Device) -> Optimizers:
    decayed = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    if name == "adamw, foreach":
        return Optimizers(torch.optim.AdamW(model.parameters(), foreach=True, **decayed))
    return build_optimizers(
        model, name.split(",")[0], **decayed, decay_on="matrices", muon_dtype=device.dtype
    )


def update(model: GPT, optimizers: Optimizers, clip: bool = True) -> None:
    """The end of a step, as in app.train.loop."""
    parameters = list(model.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm.item()
    if clip:
        clip_grads_with_norm_(parameters, 1.0, norm)
    optimizers.step()
