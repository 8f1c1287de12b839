"""A run with a checkpoint, without the training."""

from dataclasses import asdict
from pathlib import Path

import torch

from app.model.gpt import GPT, GPTConfig
from app.runs.checkpoint import Snapshot, checkpoint_folder, write_checkpoint
from app.runs.checkpoint_state import CheckpointState
from app.settings.train import TrainSettings
from app.train.optimizer import build_optimizers

# Few layers; the vocabulary is GPT-2's, so that it writes every kind of character, in pieces.
SMALL = GPTConfig(context_length=64, num_layers=2, embd_size=16, num_heads=2)


def write_run(run_dir: Path, step: int = 7, config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """Write a checkpoint of a model with random weights, and return the model."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for parameter in model.parameters():
        # Far from uniform, so that temperature and top-k matter.
        parameter.data *= 20
    rewrite(run_dir, model, step)
    return model


def rewrite(run_dir: Path, model: GPT, step: int = 7) -> None:
    """Write a checkpoint of a model, in the place of the one before."""
    optimizers = build_optimizers(model, TrainSettings(optimizer="adamw"))
    snapshot = Snapshot()
    snapshot.take(model, optimizers)
    state = CheckpointState(
        step=step,
        micro_batch_size=1,
        model=asdict(model.config),
        settings={},
        identity={},
        versions={},
        sequences_consumed=0,
        val_loss=4.5,
    )
    write_checkpoint(checkpoint_folder(run_dir / "checkpoints", step), snapshot, state)
