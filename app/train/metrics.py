"""metrics.jsonl: one JSON object a step, the truth about a run."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from app.files import atomic_file


class MetricsLog:
    """Appends to metrics.jsonl; on opening, steps that no checkpoint holds are cut off.

    Args:
        path: the file; created if it is missing.
        steps: how many steps the run continues from: only their lines are kept.
    """

    def __init__(self, path: Path, steps: int) -> None:
        if path.exists():
            cut_back(path, steps)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Write one step's line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the lines durable, before a checkpoint counts on them."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def cut_back(path: Path, steps: int) -> None:
    """Keep only the lines of steps 0 … steps-1; a last line that was cut off goes too."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] >= steps:
            break
        kept.append(line)
    with atomic_file(path) as file:
        file.writelines(kept)
