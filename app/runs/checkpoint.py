"""Checkpoints: a folder of two tensor files and one of JSON, complete under its final name.

No pickle: safetensors holds the tensors, JSON the rest. state.json has the SHA-256 of each file and
of itself, so that a damaged checkpoint is known as such.

Importing torch takes seconds: only what touches tensors does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import UserError
from app.files import atomic_folder, read_json, sha256_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from app.train.optimizer import Optimizers

STATE_VERSION = 2
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
TENSOR_FILES = (MODEL_FILE, OPTIMIZER_FILE)
STATE_FILE = "state.json"
STATE_KEYS = {
    **dict.fromkeys(("step", "windows_consumed", "micro_batch_size"), int),
    **dict.fromkeys(("metrics_lines", "samples_bytes"), int),
    **dict.fromkeys(("model", "identity", "settings", "versions", "sha256"), dict),
}
_OWN_HASH = "sha256_of_the_rest"


class CorruptCheckpoint(UserError):
    """A checkpoint that is incomplete or has other bytes than were written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps completed."""
        return int(self.state["step"])

    @property
    def val_loss(self) -> float | None:
        """Held-out loss of these weights, if it was measured."""
        return self.state.get("val_loss")

    def verify(self, files: Iterable[str] = TENSOR_FILES) -> None:
        """Compare the hashes of files.

        Raises:
            CorruptCheckpoint: a file is missing, or its bytes are not those that were written.
        """
        for file in files:
            path = self.folder / file
            try:
                found = sha256_of(path)
            except FileNotFoundError:
                raise CorruptCheckpoint(f"{path} is missing", _fix(self.folder)) from None
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise CorruptCheckpoint(f"{path}: {error.strerror}", _fix(self.folder)) from None
            if found != self.state["sha256"].get(file):
                raise CorruptCheckpoint(
                    f"{path} is damaged: its SHA-256 is not that of {STATE_FILE}", _fix(self.folder)
                )

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
                f"{self.folder / MODEL_FILE} does not fit the model:{' '.join(first)}",
                _fix(self.folder),
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
                raise UserError(f"{path} has no state for {name}", _fix(self.folder))
            optimizers.load(parameter, {slot: tensors[f"{slot}.{name}"] for slot in sorted(slots)})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, by name, of the model and of the optimizer.

        Raises:
            CorruptCheckpoint: a file is damaged.
        """
        return {"model": self._read(MODEL_FILE), "optimizer": self._read(OPTIMIZER_FILE)}

    def _read(self, file: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / file)
        except (OSError, SafetensorError) as error:
            raise CorruptCheckpoint(
                f"{self.folder / file} cannot be read: {error}", _fix(self.folder)
            ) from None


class Snapshot:
    """Copies in the CPU's memory of weights and optimizer state, by file and name.

    Its memory is taken once and filled again for each checkpoint; that of a GPU's is pinned, so
    that copies run at the bus's full rate.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {}

    def take(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Copy everything as it is now; returns when all is copied."""
        import torch

        on_gpu = False
        for file, tensors in (
            (MODEL_FILE, model.state_dict().items()),
            (OPTIMIZER_FILE, optimizers.named_state(model)),
        ):
            copies = self.files.setdefault(file, {})
            for name, tensor in tensors:
                if name not in copies:
                    pinned = tensor.device.type == "cuda"
                    copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                copies[name].copy_(tensor, non_blocking=True)
                on_gpu |= tensor.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()


def write_checkpoint(folder: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
    """Write a checkpoint to `folder`: all of it, or nothing under that name.

    One that is there already is replaced.
    """
    with atomic_folder(folder) as partial, ThreadPoolExecutor(len(snapshot.files)) as writers:
        paths = [partial / file for file in snapshot.files]
        written = writers.map(_write_tensors, snapshot.files.values(), paths)
        hashes = dict(zip(snapshot.files, written, strict=True))
        content = {**state, "state_version": STATE_VERSION, "sha256": hashes}
        content[_OWN_HASH] = _hash_of(content)
        (partial / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Write a safetensors file to the disk, beside others that are, and return its SHA-256."""
    save_tensors(tensors, path)
    with path.open("rb") as written:
        os.fsync(written.fileno())
    return sha256_of(path)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; OSError if the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # Its message is all that is left of the system's error.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _hash_of(state: dict[str, Any]) -> str:
    rest = {name: value for name, value in state.items() if name != _OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _fix(folder: Path) -> str:
    return f"delete {folder} to continue from the checkpoint before it"


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return checkpoints / f"step-{step:06d}"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's state.json.

    Raises:
        CorruptCheckpoint: it is missing or damaged.
        UserError: it is of another version.
    """
    if not (folder / STATE_FILE).is_file():
        raise CorruptCheckpoint(
            f"{folder} is not a checkpoint: it has no {STATE_FILE}", _fix(folder)
        )
    try:
        state = read_json(folder / STATE_FILE, _fix(folder))
    except UserError as error:
        raise CorruptCheckpoint(error.problem, error.fix) from None
    is_as_written = state.get(_OWN_HASH) == _hash_of(state)
    if state.get("state_version") != STATE_VERSION and (is_as_written or _OWN_HASH not in state):
        raise UserError(
            f"{folder} has state version {state.get('state_version')}, "
            f"this program reads {STATE_VERSION}",
            "use the program that wrote it",
        )
    missing = [key for key, kind in STATE_KEYS.items() if not isinstance(state.get(key), kind)]
    if missing:
        raise CorruptCheckpoint(
            f"{folder / STATE_FILE} is damaged: it lacks {', '.join(missing)}", _fix(folder)
        )
    if not is_as_written or folder.name != checkpoint_folder(folder, state["step"]).name:
        raise CorruptCheckpoint(
            f"{folder / STATE_FILE} is damaged: its SHA-256 is another", _fix(folder)
        )
    return Checkpoint(folder, state)
