"""Milliseconds of parts of a step, with one thing changed at a time.

    python -m benchmarks.gpu_variants SPEC

prints a line of JSON for each variant; on a CPU it needs TRITON_INTERPRET=1. The first of a group
is the program's own, and comes again at the end: differences no larger than between these two are
noise. `difference` is the largest one of a gradient, relative to the program's.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.hardware.device import Device, select_device
from app.model.cross_entropy import VOCAB_MULTIPLE, fused_output_loss
from app.model.gpt import MLP, Block, CausalSelfAttention, GPTConfig
from app.settings.train import TrainSettings
from app.train.compile import compiled_loss
from app.train.optimizer import build_optimizers
from benchmarks.training_setup import model_and_batch, timed, update

PROGRAM = "the program's"
# Computes once, and returns what the variants of a group must agree in.
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """What is measured, and where."""

    spec: dict[str, Any]
    device: Device

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**self.spec["model"])

    @property
    def micro_batches(self) -> int:
        return int(self.spec["sequences_per_step"] // self.spec["micro_batch"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a micro-batch in the residual stream."""
        return self.spec["micro_batch"], self.config.context_length, self.config.embd_size

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function) if self.spec.get("compile", True) else function


def output_layer(case: Case) -> dict[str, Callable[[], Call]]:
    """Loss of a micro-batch and its gradients."""
    from app.model import cross_entropy_kernel as kernel

    def call_of(
        loss_of: Callable[..., Tensor], block: int = kernel._BLOCK, warps: int = kernel._WARPS
    ) -> Call:
        kernel._BLOCK, kernel._WARPS = block, warps
        B, T, C = case.shape
        vocab_size, there = case.config.vocab_size, case.device.torch_device
        torch.manual_seed(0)
        hidden = torch.randn(B * T, C).to(there).requires_grad_()
        weight = (0.02 * torch.randn(vocab_size, C)).to(there).requires_grad_()
        targets = torch.randint(vocab_size, (B * T,)).to(there)
        compiled = case.compiled(loss_of)

        def call() -> list[Tensor]:
            hidden.grad = weight.grad = None
            with case.device.forward_pass():
                loss = compiled(hidden, weight, targets)
            loss.backward()
            assert hidden.grad is not None
            assert weight.grad is not None
            return [loss.detach(), hidden.grad, weight.grad]

        return call

    return {
        PROGRAM: partial(call_of, fused_output_loss),
        "8-bit floats": partial(call_of, partial(fused_output_loss, fp8=True)),
        "8192 logits at a time, 16 warps": partial(call_of, fused_output_loss, 8192, 16),
        "torch's, logits sliced": partial(call_of, sliced),
        "torch's, no padding": partial(call_of, unpadded),
        "torch's, padding masked": partial(call_of, masked),
    }


def padded_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, F.pad(weight, (0, 0, 0, -len(weight) % VOCAB_MULTIPLE)))


def sliced(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(padded_logits(hidden, weight)[:, : len(weight)].float(), targets)


def unpadded(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def masked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = padded_logits(hidden, weight).float()
    is_padding = torch.arange(logits.shape[1], device=logits.device) >= len(weight)
    return F.cross_entropy(logits.masked_fill(is_padding, -torch.inf), targets)


class UnfoldedAttention(CausalSelfAttention):
    """Scales what the projection returns instead of its weights."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.num_heads, C // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scaled: Tensor = self.output_scale * self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return scaled


def block(case: Case) -> dict[str, Callable[[], Call]]:
    """One block and a micro-batch, with the prototypes."""
    from benchmarks.gpu_prototypes import OnePassAttention, OnePassMLP

    def call_of(
        attn: type = CausalSelfAttention,
        mlp: type = MLP,
        residual: torch.dtype = case.device.dtype,
        attention: SDPBackend | None = None,
    ) -> Call:
        torch.manual_seed(0)
        one, there = Block(case.config).to(case.device.torch_device), case.device.torch_device
        one.attn.__class__, one.mlp.__class__ = attn, mlp
        x = torch.randn(case.shape).to(there, residual).requires_grad_()
        gradient = (1e-3 * torch.randn(case.shape)).to(there, residual)
        compiled = case.compiled(one)

        def call() -> list[Tensor]:
            # Weights add their gradients up, as in a step.
            x.grad = None
            chosen = sdpa_kernel(attention) if attention else nullcontext()
            with case.device.forward_pass(), chosen:
                y = compiled(x)
            y.backward(gradient)
            return [one.grad for one in (x, *one.parameters()) if one.grad is not None]

        return call

    return {
        PROGRAM: call_of,
        "prototype: GELU backward in one pass": partial(call_of, mlp=OnePassMLP),
        "prototype: q, k, v backward in one pass": partial(call_of, attn=OnePassAttention),
        "residual stream in float32": partial(call_of, residual=torch.float32),
        "attention's output scaled": partial(call_of, attn=UnfoldedAttention),
        "flash attention": partial(call_of, attention=SDPBackend.FLASH_ATTENTION),
    }


def step(case: Case) -> dict[str, Callable[[], Call]]:
    """All passes of a step, with the prototypes."""
    from benchmarks.gpu_prototypes import CastOnce, OnePassAttention, OnePassMLP

    windows = case.spec["sequences_per_step"]

    def call_of(
        at_once: int = case.spec["micro_batch"],
        attn: type = CausalSelfAttention,
        mlp: type = MLP,
        *,
        cast_once: bool = False,
    ) -> Call:
        model, batch = model_and_batch(case.spec, case.device, windows)
        for one in model.transformer.h:
            one.attn.__class__, one.mlp.__class__ = attn, mlp
        cast = CastOnce(model, case.device.dtype) if cast_once else None
        used = cast.model if cast else model
        loss = compiled_loss(used, case.device) if case.spec.get("compile", True) else used

        def call() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            if cast:
                cast.cast()
            for inputs, targets in zip(*(part.split(at_once) for part in batch), strict=True):
                with case.device.forward_pass():
                    value = loss(inputs, targets) / (windows // at_once)
                value.backward()
                if cast:
                    cast.add_gradients()
            return [one.grad for one in model.parameters() if one.grad is not None]

        return call

    return {
        PROGRAM: call_of,
        "twice as many windows at once": partial(call_of, 2 * case.spec["micro_batch"]),
        "prototype: weights cast once a step": partial(call_of, cast_once=True),
        "prototypes: GELU and q, k, v backward in one pass": partial(
            call_of, attn=OnePassAttention, mlp=OnePassMLP
        ),
    }


def end_of_step(case: Case) -> dict[str, Callable[[], Call]]:
    """Norm, clipping and update."""

    def call_of(optimizer: str = "muon") -> Call:
        model, _ = model_and_batch(case.spec, case.device, 1)
        gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
        optimizers = build_optimizers(model, TrainSettings(optimizer=optimizer), case.device.dtype)

        def call() -> list[Tensor]:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            update(model, optimizers)
            return []

        return call

    return {PROGRAM: call_of, "AdamW for all": partial(call_of, "adamw")}


def measured(case: Case, known: Set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variant that is not known yet: milliseconds of a call, and of all calls in a step."""
    layers, micro_batches = case.config.num_layers, case.micro_batches
    groups = {
        "block": (block, layers * micro_batches, 10),
        "output layer": (output_layer, micro_batches, 10),
        "step": (step, 1, 1),
        "end of a step": (end_of_step, 1, 1),
    }
    device = case.device
    on_gpu = device.torch_device.type == "cuda"
    for group, (variants_of, calls_in_step, at_once) in groups.items():
        variants = variants_of(case)
        variants[f"{PROGRAM}, again"] = variants[PROGRAM]
        if {f"{group}: {variant}" for variant in variants} <= known:
            continue
        program: list[Tensor] = []
        for variant, prepare in variants.items():
            name = f"{group}: {variant}"
            # The program's is always needed to compare with.
            if name in known and variant != PROGRAM:
                continue
            # Neither knows that another attention kernel takes other code.
            torch.compiler.reset()
            torch.compiler.config.cache_key_tag = name
            try:
                call = prepare()
                found = call()
                if variant == PROGRAM:
                    program = [one.clone() for one in found]
                difference = max(map(relative, found, program), default=None)
                calls = at_once if on_gpu else 1
                seconds = timed(device, partial(times, calls, call), 1, case.spec["repeats"])
            # A prototype may fail in any way on a GPU that it has never seen.
            except Exception as error:  # noqa: BLE001
                yield name, {"failed": repr(error)[:300]}
                continue
            ms = 1000 * statistics.median(seconds) / calls
            result = {
                "ms": ms,
                "spread_ms": [1000 * end(seconds) / calls for end in (min, max)],
                "ms_a_step": ms * calls_in_step,
                "difference": difference,
            }
            if name not in known:
                yield name, result
            del call, found
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()


def times(count: int, call: Call) -> None:
    for _ in range(count):
        call()


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖"""
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    return float(difference)


def main(spec: dict[str, Any]) -> None:
    device = select_device(spec["device"], "auto", "auto")
    for name, found in measured(Case(spec, device), set(spec["known"])):
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
