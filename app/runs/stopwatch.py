"""The time between steps, by kind: fields of metrics.jsonl, in milliseconds."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from app.hardware.proc import process_seconds

# Since the step before. Only the first line after a start has setup_ms.
PAUSES = ("setup_ms", "val_ms", "sample_ms", "save_ms")


class PauseTimer:
    """Adds up what passes between steps, by kind; it begins with the start of the process."""

    def __init__(self) -> None:
        self._spent = {"setup_ms": 1000 * process_seconds()}

    @contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        """Count the time of the block as `kind`, one of PAUSES."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = 1000 * (time.perf_counter() - started)
            self._spent[kind] = self._spent.get(kind, 0.0) + spent

    def add_to(self, record: dict[str, Any]) -> None:
        """Add to a step's record what has passed since the record before."""
        for kind, spent in self._spent.items():
            record[kind] = record.get(kind, 0.0) + spent
        self._spent.clear()


def total_seconds(records: Iterable[dict[str, Any]]) -> float:
    """Return the seconds of some steps, with all that passed between them."""
    return sum(record.get(kind) or 0 for record in records for kind in ("step_ms", *PAUSES)) / 1000
