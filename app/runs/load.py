"""Loading of the model in a checkpoint."""

from app.errors import UserError
from app.hardware.device import Device
from app.model.gpt import GPT, GPTConfig
from app.runs.checkpoint import Checkpoint
from app.runs.checkpoint_state import other_version


def load_gpt(checkpoint: Checkpoint, device: Device) -> GPT:
    """Return the checkpoint's model on the device, in evaluation mode.

    Raises:
        UserError: another version of the program wrote it, it is damaged, or not finite.
    """
    shape = checkpoint.state.model
    # The default of a value that is missing may not be what the model was trained with.
    if differing := shape.keys() ^ GPTConfig.__dataclass_fields__.keys():
        names = ", ".join(sorted(differing))
        raise other_version(checkpoint.folder, f"only one of the two has {names} of a model")
    try:
        config = GPTConfig(**shape)
    except (TypeError, ValueError) as error:
        raise other_version(checkpoint.folder, f"its model is not valid: {error}") from None
    # The residual stream's dtype in training, so that the held-out loss matches training's.
    residual = checkpoint.state.settings.get("train", {}).get("residual")
    model = GPT(config, bf16_residual=residual == "bf16")
    checkpoint.load_model(model)
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(
            f"{checkpoint.folder} has weights that are not finite", "choose another --step"
        )
    return model.to(device.torch_device).eval()
