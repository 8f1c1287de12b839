"""Loading of the model in a checkpoint."""

from app.errors import UserError
from app.hardware.device import Device
from app.model.gpt import GPT, GPTConfig
from app.runs.checkpoint import Checkpoint


def load_gpt(checkpoint: Checkpoint, device: Device) -> GPT:
    """Return the checkpoint's model on the device, in evaluation mode.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        config = GPTConfig(**checkpoint.state.model)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.folder}/state.json is damaged: {error}", "use another checkpoint"
        ) from None
    # The residual stream's dtype in training, so that the held-out loss matches training's.
    residual = checkpoint.state.settings.get("train", {}).get("residual")
    model = GPT(config, bf16_residual=residual == "bf16")
    checkpoint.load_model(model)
    return model.to(device.torch_device).eval()
