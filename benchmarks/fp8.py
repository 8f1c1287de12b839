"""Held-out loss with the output layer in 8-bit floats beside bf16: same weights, same tokens.

    python benchmarks/fp8.py --dataset DIR [--steps 60] [--seeds 3] [--out FILE.json]

For a machine without a GPU: the products are app.model.fp8's, as on one, and softmax and gradient
are plain torch, since Triton's interpreter would take hours. It shows what rounding does to the
loss, not how fast it is; on a GPU compare two runs with TRAIN_PRECISION=fp8 and bf16.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.dataset import open_dataset
from app.data.sequences import SequenceOrder, num_sequences
from app.data.token_stream import TokenStream
from app.model.cross_entropy import VOCAB_MULTIPLE
from app.model.fp8 import matmul_fp8
from app.model.gpt import GPT, GPTConfig
from app.settings.train import TrainSettings
from app.train.lr_schedule import LRSchedule
from app.train.optimizer import build_optimizers

CONFIG = GPTConfig(context_length=256, num_layers=4, embd_size=256, num_heads=4)
SEQUENCES = 8
HELD_OUT_SEQUENCES = 128


class OutputLoss(torch.autograd.Function):
    """What linear_cross_entropy computes, for a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        logits = matmul_fp8(x, weight.t())[:, :vocab_size].float()
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(x)), targets] -= 1
        ctx.save_for_backward(x, weight, F.pad(gradient, (0, len(weight) - vocab_size)).to(x.dtype))
        return F.cross_entropy(logits, targets)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gradient = ctx.saved_tensors
        scale = grad_loss / len(x)
        grad_x = matmul_fp8(gradient, weight, a_is_gradient=True) * scale
        grad_weight = matmul_fp8(gradient.t(), x, a_is_gradient=True) * scale
        return grad_x, grad_weight, None, None


def loss_of(model: GPT, idx: Tensor, targets: Tensor, *, fp8: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = model.embed(idx)
        for block in model.transformer.h:
            x = block(x)
        if not fp8:
            return model.loss(x, targets)
    weight = model.transformer.wte.weight
    padded = F.pad(weight, (0, 0, 0, -len(weight) % VOCAB_MULTIPLE)).bfloat16()
    hidden = model.transformer.ln_f(x.float()).flatten(0, 1).bfloat16()
    return OutputLoss.apply(hidden, padded, targets.flatten(), len(weight))


def train(dataset: Path, seed: int, steps: int, *, fp8: bool) -> float:
    """Held-out loss in bf16 after some steps."""
    opened = open_dataset(dataset)
    stream, held_out = TokenStream(opened.train), TokenStream(opened.val)
    order = SequenceOrder(num_sequences(len(stream), CONFIG.context_length), seed, shuffle=True)
    torch.manual_seed(seed)
    model = GPT(CONFIG, bf16_residual=True)
    optimizers = build_optimizers(model, TrainSettings())
    schedule = LRSchedule(7.2e-3, "cosine", 0, steps, 0.1)
    for step in range(steps):
        optimizers.begin_step(step, schedule.learning_rate(step))
        indices = order.sequences(step * SEQUENCES, SEQUENCES)
        batch = map(torch.from_numpy, stream.sequences(indices, CONFIG.context_length))
        loss_of(model, *batch, fp8=fp8).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
    losses = []
    with torch.no_grad():
        for first in range(0, HELD_OUT_SEQUENCES, SEQUENCES):
            indices = np.arange(first, first + SEQUENCES)
            batch = map(torch.from_numpy, held_out.sequences(indices, CONFIG.context_length))
            losses.append(loss_of(model, *batch, fp8=False).item())
    return statistics.fmean(losses)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--dataset", type=Path, required=True, help="a prepared dataset folder")
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    losses: dict[str, list[float]] = {"bf16": [], "fp8": []}
    for seed in range(given.seeds):
        for precision, found in losses.items():
            found.append(train(given.dataset, seed, given.steps, fp8=precision == "fp8"))
            print(f"seed {seed}, {precision}: {found[-1]:.4f}", file=sys.stderr, flush=True)
    differences = [b - a for a, b in zip(*losses.values(), strict=True)]
    results = {
        "steps": given.steps,
        "tokens_per_step": SEQUENCES * CONFIG.context_length,
        "width": CONFIG.embd_size,
        "held_out_loss": losses,
        "fp8_minus_bf16": differences,
        "mean_difference": statistics.fmean(differences),
        "torch": torch.__version__,
    }
    print(json.dumps(results, indent=2))
    if given.out:
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
