"""Models from the checkpoints of a run."""

from app.errors import UserError
from app.hardware.device import Device
from app.model.gpt import GPT, GPTConfig
from app.runs.checkpoint import Checkpoint


def load_gpt(checkpoint: Checkpoint, device: Device) -> GPT:
    """Return the model of a checkpoint, on the device.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        config = GPTConfig(**checkpoint.state.model)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.folder}/state.json is damaged: {error}", "use another checkpoint"
        ) from None
    # As it was trained, so that evaluation gives training's held-out loss.
    trained = checkpoint.state.settings.get("train", {})
    model = GPT(config, bf16_residual=trained.get("residual") == "bf16")
    checkpoint.load_model(model)
    return model.to(device.torch_device).eval()
