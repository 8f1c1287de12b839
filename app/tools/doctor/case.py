"""The subject of one examination, and what its checks tell each other."""

from dataclasses import dataclass
from pathlib import Path

from app.settings.settings import Settings

# A parameter's weight and at most two moments of it, in float32.
CHECKPOINT_BYTES = 12


@dataclass
class Trial:
    """The measurements of a device.

    Attributes:
        device_type: cpu or cuda
        processes: that train together on this machine, each on as good a device
        matmul_flops: of a large matrix product, FLOP/s
        model_flops_per_token: of the configured model, forward and backward
        micro_batch_tokens: that went through the model at once; 0 if none did
        micro_batch_seconds: of a forward and backward pass
        optimizer_seconds: of an update
        compile_seconds: until the first pass had ended; 0 uncompiled
    """

    device_type: str
    processes: int
    matmul_flops: float = 0.0
    model_flops_per_token: float = 0.0
    micro_batch_tokens: int = 0
    micro_batch_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    compile_seconds: float = 0.0


@dataclass
class Case:
    """An examination.

    Attributes:
        settings: of the run that is meant
        verify: compare every hash of the dataset, too
        disk_bytes: that the run still needs; None if that is not known
        steps_done: of the run, as its folder says
        fingerprint: of the dataset; None if it is not complete and whole
        val_tokens: held out in it; None if it is not complete
        trial: what the device has shown; None until then
    """

    settings: Settings
    verify: bool = False
    disk_bytes: int | None = None
    steps_done: int = 0
    fingerprint: str | None = None
    val_tokens: int | None = None
    trial: Trial | None = None

    @property
    def steps_left(self) -> int:
        """Steps that the run still has to do."""
        return max(0, self.settings.train.max_steps - self.steps_done)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: what it would be made in."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
