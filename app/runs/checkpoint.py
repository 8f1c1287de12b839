"""Checkpoints: a folder of two tensor files and a JSON file.

The folder gets its final name only when complete. No pickle: safetensors holds the tensors,
JSON the rest. state.json has the SHA-256 of each file and of itself, so that damage is detected
before anything is read.

Importing torch takes seconds: only functions that touch tensors import it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from app.files import atomic_folder, read_bytes, sha256_of
from app.runs.checkpoint_state import (
    STATE_FILE,
    CheckpointState,
    CorruptCheckpoint,
    damage_advice,
    other_version,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_POSITIONS = "transformer.wpe.weight"
TENSOR_FILES = (MODEL_FILE, OPTIMIZER_FILE)


class OptimizerState(Protocol):
    """The state of a model's optimizers, parameter by parameter: app.train.optimizer."""

    def named_state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield all state as (`exp_avg.transformer.wte.weight`, tensor)."""

    def load(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Copy the state of one parameter, by name, into the optimizer."""

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and dtypes that `load` takes; without memory."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and its state."""

    folder: Path
    state: CheckpointState

    @property
    def step(self) -> int:
        """Return the number of steps completed."""
        return self.state.step

    def verify(self, files: Iterable[str] = TENSOR_FILES) -> None:
        """Compare the hashes of files with those in state.json.

        Raises:
            CorruptCheckpoint: a file is missing, or differs from what was written.
            UserError: another version of the program wrote other files.
        """
        for file in files:
            if file not in self.state.sha256:
                raise other_version(self.folder, f"{STATE_FILE} lists no {file}")
            path = self.folder / file
            with _damage_as_corrupt(path):
                sha256 = sha256_of(path)
            if sha256 != self.state.sha256[file]:
                raise CorruptCheckpoint(
                    f"{path} is damaged: its SHA-256 does not match the one in {STATE_FILE}",
                    damage_advice(self.folder),
                )

    def load_model(self, model: nn.Module, *, positions: int | None = None) -> None:
        """Load the weights into a model of the same shape.

        Args:
            positions: take so many of the learned positions; None for all.

        Raises:
            UserError: the file is damaged, or its tensors are not those of the model.
        """
        tensors = self._read(MODEL_FILE)
        if positions is not None and _POSITIONS in tensors:
            tensors[_POSITIONS] = tensors[_POSITIONS][:positions]
        self._check_fits(MODEL_FILE, tensors, model.state_dict())
        model.load_state_dict(tensors)

    def load(self, model: nn.Module, optimizers: OptimizerState) -> None:
        """Load the weights, and the optimizer state of every parameter.

        Raises:
            UserError: a file is damaged, or its tensors are not those of this program.
        """
        self.load_model(model)
        tensors = self._read(OPTIMIZER_FILE)
        parameters = dict(model.named_parameters())
        expected = {name: optimizers.empty_state(it) for name, it in parameters.items()}
        flat = {
            f"{slot}.{name}": it for name, state in expected.items() for slot, it in state.items()
        }
        self._check_fits(OPTIMIZER_FILE, tensors, flat)
        for name, parameter in parameters.items():
            optimizers.load(parameter, {slot: tensors[f"{slot}.{name}"] for slot in expected[name]})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors of the model and of the optimizer, by name.

        Raises:
            CorruptCheckpoint: a file is damaged.
        """
        return {"model": self._read(MODEL_FILE), "optimizer": self._read(OPTIMIZER_FILE)}

    def _check_fits(
        self, file: str, actual: dict[str, Tensor], expected: Mapping[str, Tensor]
    ) -> None:
        """Raise UserError that names how tensors differ from those of this program's model."""
        faults = [f"it lacks {name}" for name in expected if name not in actual]
        faults += [f"it has {name} as well" for name in actual if name not in expected]
        for name in [name for name in expected if name in actual]:
            found, needed = (
                f"{it[name].dtype} {list(it[name].shape)}" for it in (actual, expected)
            )
            if found != needed:
                faults.append(f"{name} is {found}, not {needed}")
        if faults:
            more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise other_version(self.folder, f"in {file} {'; '.join(faults[:3])}{more}")

    def _read(self, file: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file

        path = self.folder / file
        with _damage_as_corrupt(path), path.open("rb") as opened:
            try:
                try:
                    # By its number: safetensors refuses a path whose bytes are not UTF-8.
                    return load_file(f"/proc/self/fd/{opened.fileno()}")
                except OSError:
                    # Some file systems map no file. Any other error comes again, with its number.
                    return load(read_bytes(path))
            except SafetensorError as error:
                raise CorruptCheckpoint(
                    f"{path} cannot be read: {error}", damage_advice(self.folder)
                ) from None


@contextmanager
def _damage_as_corrupt(path: Path) -> Iterator[None]:
    """Raise CorruptCheckpoint if a file is missing or the disk cannot read it."""
    try:
        yield
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path} is missing", damage_advice(path.parent)) from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CorruptCheckpoint(f"{path}: {error.strerror}", damage_advice(path.parent)) from None


class Snapshot:
    """Copies of weights and optimizer state in CPU memory, by file and name.

    The memory is allocated once and filled again for each checkpoint. For GPU tensors it is
    pinned, so that copies run at the full rate of the bus.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {}

    def take(self, model: nn.Module, optimizers: OptimizerState) -> None:
        """Copy everything as it is now. Returns when the copies are complete."""
        import torch

        on_gpu = False
        for file, tensors in (
            (MODEL_FILE, model.state_dict().items()),
            (OPTIMIZER_FILE, optimizers.named_state(model)),
        ):
            copies = self.files.setdefault(file, {})
            for name, tensor in tensors:
                pinned = tensor.device.type == "cuda"
                if name not in copies:
                    copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                copies[name].copy_(tensor, non_blocking=pinned)
                on_gpu |= pinned
        if on_gpu:
            torch.cuda.synchronize()


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return checkpoints / f"step-{step:06d}"


def write_checkpoint(folder: Path, snapshot: Snapshot, state: CheckpointState) -> None:
    """Write a checkpoint to `folder`: all of it, or nothing under that name.

    An existing checkpoint is replaced.
    """
    with atomic_folder(folder) as partial, ThreadPoolExecutor(len(snapshot.files)) as writers:
        paths = [partial / file for file in snapshot.files]
        hashes = writers.map(_write_tensors, snapshot.files.values(), paths)
        replace(state, sha256=dict(zip(snapshot.files, hashes, strict=True))).write(partial)


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Write a safetensors file, flush it to the disk, and return its SHA-256."""
    save_tensors(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; OSError if the disk refuses it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # The errno survives only in the message text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's state.json.

    Raises:
        CorruptCheckpoint: it is missing or damaged, or its step is not its folder's.
        UserError: another version of the program wrote it.
    """
    state = CheckpointState.read(folder)
    if folder.name != checkpoint_folder(folder, state.step).name:
        raise CorruptCheckpoint(
            f"{folder} holds the checkpoint of step {state.step}", damage_advice(folder)
        )
    return Checkpoint(folder, state)
