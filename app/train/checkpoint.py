"""Checkpoints: a folder of two tensor files and one of JSON, complete under its final name.

No pickle: safetensors holds the tensors, JSON the rest.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.errors import UserError
from app.files import PARTIAL, fsync_folder, read_json
from app.train.optimizer import Optimizers

STATE_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
STATE_KEYS = {
    **dict.fromkeys(("step", "windows_consumed", "micro_batch_size", "samples_bytes"), int),
    **dict.fromkeys(("model", "identity", "settings", "versions"), dict),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps completed."""
        return int(self.state["step"])

    def load_model(self, model: nn.Module) -> None:
        """Load the weights into a model of the same shape.

        Raises:
            UserError: the file is damaged or of another model.
        """
        tensors = self._read(MODEL_FILE)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2]
            raise UserError(
                f"{self.folder / MODEL_FILE} does not fit the model:{' '.join(first)}", self._fix
            ) from None

    def load_optimizers(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Load the state of every parameter of `model`.

        Raises:
            UserError: the file is damaged or of another model.
        """
        tensors = self._read(OPTIMIZER_FILE)
        for name, parameter in model.named_parameters():
            slots = {key.partition(".")[0] for key in tensors if key.partition(".")[2] == name}
            if not slots:
                path = self.folder / OPTIMIZER_FILE
                raise UserError(f"{path} has no state for {name}", self._fix)
            optimizers.state(parameter).update(
                {
                    # A copy: the tensors that were read are mapped to the file.
                    slot: tensors[f"{slot}.{name}"].to(parameter.device, copy=True)
                    for slot in sorted(slots)
                }
            )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, by name, of the model and of the optimizer.

        Raises:
            UserError: a file is damaged.
        """
        return {"model": self._read(MODEL_FILE), "optimizer": self._read(OPTIMIZER_FILE)}

    def _read(self, file: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / file} cannot be read: {error}", self._fix) from None

    @property
    def _fix(self) -> str:
        return f"delete {self.folder} to continue from the checkpoint before it"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]
) -> None:
    """Write a checkpoint to `folder`: all of it, or nothing under that name."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fsync_folder(folder.parent.parent)
    try:
        save_file(_contiguous(model.state_dict()), partial / MODEL_FILE)
        slots = {
            f"{slot}.{name}": value
            for name, parameter in model.named_parameters()
            for slot, value in optimizers.state(parameter).items()
        }
        save_file(_contiguous(slots), partial / OPTIMIZER_FILE)
        content = json.dumps({"state_version": STATE_VERSION, **state}, indent=2)
        (partial / STATE_FILE).write_text(content + "\n", encoding="utf-8")
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        fsync_folder(partial)
        partial.rename(folder)
        fsync_folder(folder.parent)
    except SafetensorError as error:
        # Its message is all that is left of the system's error.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return checkpoints / f"step-{step:06d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints below a folder, ascending."""
    if not checkpoints.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d{6,})", path.name) for path in checkpoints.iterdir())
    return sorted(int(name[1]) for name in names if name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's state.json.

    Raises:
        UserError: it is missing, damaged or of another version.
    """
    fix = f"delete {folder} to continue from the checkpoint before it"
    if not (folder / STATE_FILE).is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {STATE_FILE}", fix)
    state = read_json(folder / STATE_FILE, fix)
    if state.get("state_version") != STATE_VERSION:
        raise UserError(
            f"{folder} has state version {state.get('state_version')}, "
            f"this program reads {STATE_VERSION}",
            "use the program that wrote it",
        )
    missing = [key for key, kind in STATE_KEYS.items() if not isinstance(state.get(key), kind)]
    if missing:
        raise UserError(f"{folder / STATE_FILE} is damaged: it lacks {', '.join(missing)}", fix)
    return Checkpoint(folder, state)


def latest_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint:
    """The last checkpoint of a run, or the one after `step` steps.

    Raises:
        UserError: there is none.
    """
    checkpoints = run_dir / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    if not run_dir.is_dir():
        known = sorted(path.name for path in run_dir.parent.glob("*/") if path.is_dir())
        raise UserError(
            f"there is no run {run_dir}",
            f"set TRAIN_RUN_NAME to one of: {', '.join(known)}" if known else "train first",
        )
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint yet", "let train reach its first one")
    if step is not None and step not in steps:
        raise UserError(
            f"{run_dir} has no checkpoint of step {step}",
            f"choose one of: {', '.join(map(str, steps))}",
        )
    return open_checkpoint(checkpoint_folder(checkpoints, steps[-1] if step is None else step))


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    for step in checkpoint_steps(checkpoints)[:-keep]:
        folder = checkpoint_folder(checkpoints, step)
        folder.rename(folder.with_name(folder.name + PARTIAL))
    remove_partial_checkpoints(checkpoints)


def remove_partial_checkpoints(checkpoints: Path) -> None:
    """Delete what a killed save or pruning has left; no other process may be saving."""
    for partial in checkpoints.glob(f"*{PARTIAL}"):
        shutil.rmtree(partial)
