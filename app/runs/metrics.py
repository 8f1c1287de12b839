"""metrics.jsonl: one JSON object a step, the truth about a run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from app.errors import UserError
from app.files import AppendOnlyFile, atomic_file

# Beyond it the exponential is no float.
_LARGEST_LOSS = 700.0


class MetricsLog:
    """Appends to metrics.jsonl; on opening, steps that no checkpoint holds are cut off.

    Lines that a full disk does not take are kept, and written when it takes them.

    Args:
        path: the file; created if it is missing.
        steps: how many steps the run continues from: only their lines are kept.

    Raises:
        UserError: lines are missing or damaged.
    """

    def __init__(self, path: Path, steps: int) -> None:
        if path.exists():
            cut_back(path, steps)
        elif steps:
            raise UserError(
                f"{path} is missing, and the run has {steps} steps",
                "put it back, or set TRAIN_RUN_NAME to a new name",
            )
        self._file = AppendOnlyFile(path)
        self._lines = steps

    def append(self, record: dict[str, Any]) -> None:
        """Write one step's line, and those before that could not be written.

        Raises:
            OSError: the disk is full or fails; the line is kept.
        """
        self._lines += 1
        self._file.append(_line(record).encode())

    def sync(self) -> int:
        """Make the lines durable, before a checkpoint counts on them; tell how many there are."""
        self._file.sync()
        return self._lines


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token; of a model that has diverged, some huge number."""
    return math.exp(min(loss, _LARGEST_LOSS))


def cut_back(path: Path, steps: int) -> None:
    """Keep only the lines of steps 0 … steps-1; UserError if they are not all there."""
    kept = [record for record in read_metrics(path) if record["step"] < steps]
    if [record["step"] for record in kept] != list(range(steps)):
        raise UserError(
            f"{path} does not have a line for each of the {steps} steps of the checkpoint",
            "put the missing lines back, or set TRAIN_RUN_NAME to a new name",
        )
    with atomic_file(path) as file:
        file.writelines(_line(record).encode() for record in kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that is still being written is left out.

    Raises:
        UserError: a line is not the JSON object of a step.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            needed = record["step"], record["tokens"], record["train_loss"]
            np.array([*map(int, needed[:2]), *record.values()], dtype=np.float64)
            if any(isinstance(value, str) for value in record.values()):
                raise ValueError("text instead of a number")
        except (ArithmeticError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is not the JSON object of a step: {error!r}",
                "delete that line",
            ) from error
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
