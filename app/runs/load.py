"""Loading of the model in a checkpoint."""

from app.errors import UserError
from app.hardware.device import Device
from app.model.architectures import build_config, build_model
from app.model.language_model import LanguageModel
from app.runs.checkpoint import Checkpoint
from app.runs.checkpoint_state import other_version
from app.runs.code import warn_of_other_model


def load_model(checkpoint: Checkpoint, device: Device) -> LanguageModel:
    """Return the checkpoint's model on the device, in evaluation mode.

    Raises:
        UserError: another version of the program wrote it, it is damaged, or not finite.
    """
    try:
        config = build_config(checkpoint.state.model)
    except (TypeError, ValueError) as error:
        raise other_version(checkpoint.folder, str(error)) from None
    # The residual stream's dtype in training, so that the held-out loss matches training's.
    residual = checkpoint.state.settings.get("train", {}).get("residual")
    model = build_model(config, bf16_residual=residual == "bf16")
    warn_of_other_model(checkpoint)
    checkpoint.load_model(model)
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(
            f"{checkpoint.folder} has weights that are not finite", "choose another --step"
        )
    return model.to(device.torch_device).eval()
