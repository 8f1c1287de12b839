"""A model that trains in milliseconds, and what a training loop and a checkpoint need with it."""

import numpy as np
import torch
from torch import nn

from app.data.sequences import BatchPlan, SequenceOrder, num_sequences
from app.data.token_stream import TokenStream
from app.hardware.device import Device
from app.model.gpt import GPT, GPTConfig
from app.runs.checkpoint_state import CheckpointState, PendingWork
from app.train.dataloader import BatchLoader
from app.train.optimizer import Optimizers

CONFIG = GPTConfig(context_length=8, vocab_size=64, num_layers=1, embd_size=8, num_heads=2)
CPU = Device(torch.device("cpu"), "CPU", "float32", True, None)
SEQUENCES_PER_STEP = 4
NO_WORK = PendingWork()
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 500).astype(np.uint16)


def new_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(CONFIG)


def adamw(model: nn.Module) -> Optimizers:
    return Optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))


def new_loader(micro_batch_size: int) -> BatchLoader:
    """Read TOKENS in their order, four sequences a step."""
    return BatchLoader(
        TokenStream([TOKENS]),
        SequenceOrder(num_sequences(TOKENS.size, CONFIG.context_length), seed=0, shuffle=False),
        BatchPlan(SEQUENCES_PER_STEP, world_size=1, micro_batch_size=micro_batch_size),
        rank=0,
        sequences_consumed=0,
        context_length=CONFIG.context_length,
        device=CPU.torch_device,
    )


def train_one_step(model: GPT, optimizers: Optimizers) -> None:
    """Give every parameter an optimizer state, and other weights."""
    inputs, targets = (torch.from_numpy(TOKENS[i : i + 8].astype(np.int64))[None] for i in (0, 1))
    model(inputs, targets).backward()
    optimizers.step()


def checkpoint_state(
    step: int,
    *,
    val_loss: float | None = None,
    identity: dict[str, object] | None = None,
    pending: PendingWork = NO_WORK,
) -> CheckpointState:
    return CheckpointState(
        step=step,
        micro_batch_size=2,
        model={"architecture": "gpt2", "num_layers": 1},
        settings={"train": {"max_steps": 10}},
        identity={"architecture": "gpt2"} | (identity or {}),
        versions={"python": "3"},
        sequences_consumed=step * SEQUENCES_PER_STEP,
        val_loss=val_loss,
        pending=pending,
    )
