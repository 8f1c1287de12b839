"""tensorboard/: the lines of metrics.jsonl as scalars for TensorBoard, made anew by every start.

The format is that of its readers: protobuf `Event`s, each framed as a TFRecord
(https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto).
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

_NAME = "events.out.tfevents."
_NOT_DRAWN = {"step", "tokens"}


class EventLog:
    """Appends to a run's event file; on opening, a new one of the given steps replaces it.

    It is written in the caller's thread, since tensorboard's own EventFileWriter imports all of
    tensorflow where that is installed, and its thread dies with a traceback on a full disk.
    Training goes on without events where the tensorboard package is missing, and, with a warning,
    where they cannot be written.

    Args:
        folder: for the event file; created if it is missing.
        records: the lines of metrics.jsonl so far.
    """

    def __init__(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        self._folder = folder
        self._writer: Any = None
        try:
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ModuleNotFoundError:
            return
        try:
            folder.mkdir(exist_ok=True)
            for earlier in folder.glob(f"{_NAME}*"):
                earlier.unlink()
            # A TensorBoard that is watching looks for names that sort after those it has read.
            self._writer = RecordWriter((folder / f"{_NAME}{time.time_ns()}").open("wb"))
        except OSError as error:
            self._give_up(error)
        else:
            self._write(_history(records))

    def append(self, record: dict[str, Any]) -> None:
        """Write one step's points, so that they can be seen at once."""
        if self._writer is not None:
            self._write([_event(record, time.time())])

    def _write(self, events: Sequence[bytes]) -> None:
        try:
            for event in events:
                self._writer.write(event)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None
        tqdm.write(
            f"training goes on without TensorBoard events in {self._folder}: {error}; "
            "the next start writes all of them again",
            file=sys.stderr,
        )


def _history(records: Sequence[dict[str, Any]]) -> list[bytes]:
    """Events of steps that ended one after the other until now, after the file's first event."""
    from tensorboard.compat.proto.event_pb2 import Event

    wall_time = time.time() - sum(record["step_ms"] for record in records) / 1000
    events = [Event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString()]
    for record in records:
        wall_time += record["step_ms"] / 1000
        events.append(_event(record, wall_time))
    return events


def _event(record: dict[str, Any], wall_time: float) -> bytes:
    """One step's Event: a float32 scalar for everything that was measured."""
    from tensorboard.compat.proto.event_pb2 import Event

    values = [
        {"tag": name, "simple_value": value}
        for name, value in record.items()
        if name not in _NOT_DRAWN and value is not None
    ]
    event = Event(wall_time=wall_time, step=record["step"], summary={"value": values})
    return event.SerializeToString()
