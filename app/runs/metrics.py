"""metrics.jsonl: one JSON object per step, from which reports and events are made."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter, ValidationError

from app.errors import UserError
from app.files import AppendOnlyFile, atomic_file, read_bytes
from app.hardware.proc import process_seconds

# Time outside steps. Only the first record after a start has setup_ms.
PAUSES = ("setup_ms", "val_ms", "hellaswag_ms", "sample_ms", "save_ms")
# exp() of anything larger overflows a float.
_LARGEST_LOSS = 700.0
# Curve in TensorBoard and trackers -> column. They sort groups by name: the loss comes first.
CURVES = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "optim/grad_norm": "grad_norm",
    "optim/loss_scale": "loss_scale",
    "optim/lr": "lr",
    "perf/memory_bytes": "memory_bytes",
    "perf/mfu": "mfu",
    "perf/step_ms": "step_ms",
    "perf/tokens_per_second": "tokens_per_second",
    "score/hellaswag": "hellaswag",
}
_Int64 = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class StepRecord:
    """The measurements of one optimizer step: a line of metrics.jsonl. None means not measured.

    Attributes:
        step: its number, from 0
        tokens: tokens trained on so far, this step included
        train_loss: mean over the step's tokens, nats per token, before the update
        lr: learning rate
        grad_norm: global gradient norm before clipping; None if the update was skipped
        step_ms: time of the step, milliseconds
        tokens_per_second: rate of all ranks together
        mfu: model FLOPs utilization, a fraction; None where the peak is not known
        memory_bytes: peak memory so far
        data_ms: part of step_ms spent waiting for data
        loss_scale: factor of the loss, in fp16
        skipped: True if the gradients overflowed in fp16, and nothing was updated
        val_loss: held-out loss after the step, nats per token
        hellaswag: share of HellaSwag's questions answered after the step, acc_norm
        setup_ms, val_ms, hellaswag_ms, sample_ms, save_ms: time outside the step, since the
            previous record: start of the process, evaluations (also those after this step),
            sampling, saving
    """

    step: _Int64
    tokens: _Int64
    train_loss: float
    lr: float | None = None
    grad_norm: float | None = None
    step_ms: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory_bytes: int | float | None = None
    data_ms: float | None = None
    loss_scale: float | None = None
    skipped: bool | None = None
    val_loss: float | None = None
    hellaswag: float | None = None
    setup_ms: float | None = None
    val_ms: float | None = None
    hellaswag_ms: float | None = None
    sample_ms: float | None = None
    save_ms: float | None = None

    def plus(self, pauses: dict[str, float], **measured: float | None) -> Self:
        """Return the record with pauses added to its own, and what evaluations have measured."""
        changes: dict[str, Any] = dict(measured)
        changes |= {kind: (getattr(self, kind) or 0.0) + pauses[kind] for kind in pauses}
        return replace(self, **changes)

    def curves(self) -> dict[str, float]:
        """Return what was measured, by the names of CURVES."""
        values = {name: getattr(self, column) for name, column in CURVES.items()}
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the measured fields, and mfu: null where it is not known."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name == "mfu"
        }


COLUMNS = tuple(field.name for field in fields(StepRecord))
_RECORD = TypeAdapter(StepRecord)


class PauseTimer:
    """Adds up the time that passes between steps, by kind; starts with the process.

    Attributes:
        last: milliseconds that the last pause of each kind took
    """

    def __init__(self) -> None:
        self._pauses = {"setup_ms": 1000 * process_seconds()}
        self.last: dict[str, float] = {}

    @contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        """Add the time of the block to `kind`, one of PAUSES."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = 1000 * (time.perf_counter() - started)
            self._pauses[kind] = self._pauses.get(kind, 0.0) + spent
            self.last[kind] = spent

    def take(self) -> dict[str, float]:
        """Return the milliseconds since the last call, by kind."""
        pauses, self._pauses = self._pauses, {}
        return pauses


def total_seconds(records: Iterable[StepRecord]) -> float:
    """Return the seconds that steps took, with the pauses before them."""
    kinds = ("step_ms", *PAUSES)
    return sum(getattr(record, kind) or 0 for record in records for kind in kinds) / 1000


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats per token, or a huge number if the model has diverged."""
    return math.exp(min(loss, _LARGEST_LOSS))


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float | None:
    """Return a loss in nats per token as bits per byte of text; None if there is no text."""
    return loss * tokens / math.log(2) / num_bytes if num_bytes else None


class MetricsLog:
    """Appends to metrics.jsonl. Opening it drops the lines written after the checkpoint.

    Lines that cannot be written to a full disk are buffered, and written once there is room.

    Args:
        path: the file; created if it is missing.
        steps: how many steps the run continues from; only their lines are kept.

    Attributes:
        records: the records of those steps

    Raises:
        UserError: lines are missing or damaged.
    """

    def __init__(self, path: Path, steps: int) -> None:
        kept = first_steps(path, steps)
        self.records = [record for record, _ in kept]
        with atomic_file(path) as file:
            file.writelines(line for _, line in kept)
        self._file = AppendOnlyFile(path)
        self._lines = steps

    def append(self, record: StepRecord) -> None:
        """Write a step's line, and the earlier ones that could not be written.

        Raises:
            OSError: the disk is full or fails; the line is kept.
        """
        self._lines += 1
        self._file.append(json.dumps(record.to_json(), allow_nan=False).encode() + b"\n")

    def sync(self) -> int:
        """Make the lines durable, and return how many there are."""
        self._file.sync()
        return self._lines


def read_metrics(path: Path) -> list[StepRecord]:
    """Read metrics.jsonl; a last line that is still being written is left out.

    Raises:
        UserError: a line is not the JSON object of a step.
    """
    return [record for record, _ in parse_metrics(read_bytes(path), path)]


def first_steps(path: Path, steps: int) -> list[tuple[StepRecord, bytes]]:
    """Return the records of steps 0 … steps-1, and their lines; UserError if one is missing."""
    if steps and not path.exists():
        raise UserError(
            f"{path} is missing, and the run has {steps} steps",
            "put it back, or set TRAIN_RUN_NAME to a new name",
        )
    parsed = parse_metrics(read_bytes(path), path) if path.exists() else ()
    kept = [(record, line) for record, line in parsed if record.step < steps]
    if [record.step for record, _ in kept] != list(range(steps)):
        raise UserError(
            f"{path} does not have a line for each of the {steps} steps of the checkpoint",
            "put the missing lines back, or set TRAIN_RUN_NAME to a new name",
        )
    return kept


def parse_metrics(
    content: bytes, path: Path, first_line: int = 1
) -> Iterator[tuple[StepRecord, bytes]]:
    """Return the records in a part of metrics.jsonl that begins with a line, and their lines.

    Raises:
        UserError: a line is not the JSON object of a step; `path` and its number name it.
    """
    for number, line in enumerate(content.splitlines(keepends=True), start=first_line):
        if not line.endswith(b"\n"):
            return
        try:
            record = _RECORD.validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            fault = " ".join([*map(str, first["loc"]), first["msg"]])
            raise UserError(
                f"{path}, line {number} is not the JSON object of a step: {fault}",
                "delete that line",
            ) from None
        yield record, line
