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
    model = new_model(checkpoint)
    load_weights(checkpoint, model)
    return model.to(device.torch_device)


def new_model(checkpoint: Checkpoint) -> LanguageModel:
    """Return a model of the checkpoint's shape on the CPU, in evaluation mode, with new weights.

    Raises:
        UserError: another version of the program wrote the checkpoint.
    """
    try:
        config = build_config(checkpoint.state.model)
    except (TypeError, ValueError) as error:
        raise other_version(checkpoint.folder, str(error)) from None
    # The residual stream's dtype in training, so that the held-out loss matches training's.
    residual = checkpoint.state.settings.get("train", {}).get("residual")
    model = build_model(config, bf16_residual=residual == "bf16")
    warn_of_other_model(checkpoint)
    return model.eval()


def load_weights(checkpoint: Checkpoint, model: LanguageModel) -> None:
    """Load the checkpoint's weights into its model.

    Raises:
        UserError: they are damaged, or not finite.
    """
    checkpoint.load_model(model)
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(
            f"{checkpoint.folder} has weights that are not finite", "choose another --step"
        )
