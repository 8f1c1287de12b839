"""Models from the checkpoints of a run."""

import sys
from pathlib import Path

from app.errors import UserError
from app.model.gpt import GPT, GPTConfig
from app.train.checkpoint import Checkpoint
from app.train.checkpoints import latest_checkpoint
from app.train.device import Device


def load_gpt(run_dir: Path, step: int | None, device: Device) -> tuple[GPT, Checkpoint]:
    """The model of a run's checkpoint, by default the last, on the device.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    checkpoint, damages = latest_checkpoint(run_dir, step)
    for damaged in damages:
        print(f"warning: {damaged.problem}", file=sys.stderr, flush=True)
    try:
        config = GPTConfig(**checkpoint.state["model"])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.folder}/state.json is damaged: {error}", "use another checkpoint"
        ) from None
    # As it was trained, so that evaluation gives training's held-out loss.
    trained = checkpoint.state["settings"].get("train", {})
    model = GPT(config, bf16_residual=trained.get("residual") == "bf16")
    checkpoint.load_model(model)
    return model.to(device.torch_device).eval(), checkpoint
