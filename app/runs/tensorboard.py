"""tensorboard/: metrics, samples and settings of a run for TensorBoard, rewritten by every start.

The format is what TensorBoard reads: protobuf `Event`s, each framed as a TFRecord
(https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto).
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.formats import named_values
from app.progress import Bar
from app.runs.metrics import StepRecord, total_seconds

_NAME = "events.out.tfevents."
_HYPERPARAMETERS = ("model.", "train.")


class EventLog:
    """Appends to a run's event file. Opening it replaces any earlier one with the given history.

    It is written in the caller's thread, because tensorboard's own EventFileWriter imports all of
    tensorflow where that is installed, and its thread dies with a traceback on a full disk.
    Training continues without events if the tensorboard package is missing, or, with a warning, if
    they cannot be written.

    Args:
        folder: for the event file; created if it is missing.
        records: the lines of metrics.jsonl so far.
        samples: (steps done, texts) so far.
        metadata: the content of settings.json.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[StepRecord],
        samples: Sequence[tuple[int, Sequence[str]]],
        metadata: dict[str, Any],
    ) -> None:
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
            # A running TensorBoard looks for names that sort after those it has read.
            self._writer = RecordWriter((folder / f"{_NAME}{time.time_ns()}").open("wb"))
        except OSError as error:
            self._give_up(error)
        else:
            self._write(_history(records, samples, metadata))

    def append(self, record: StepRecord) -> None:
        """Write the points of a step, and flush them."""
        if self._writer is not None:
            self._write([_scalars(record, time.time())])

    def append_samples(self, step: int, texts: Sequence[str]) -> None:
        """Write the texts that the model generated after `step` steps."""
        if self._writer is not None:
            self._write([_samples(step, texts, time.time())])

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
        Bar.write(
            f"warning: training continues without TensorBoard events in {self._folder}: "
            f"{error}; the next start writes all of them again",
            file=sys.stderr,
        )


def _history(
    records: Sequence[StepRecord],
    samples: Sequence[tuple[int, Sequence[str]]],
    metadata: dict[str, Any],
) -> list[bytes]:
    """Return a new file's events, timed as if the steps had run back to back and ended now."""
    from tensorboard.compat.proto.event_pb2 import Event

    began = time.time() - total_seconds(records)
    events = [Event(wall_time=began, file_version="brain.Event:2").SerializeToString()]
    events += _settings(named_values(metadata), began)
    ends, end = {0: began}, began
    for record in records:
        end += total_seconds([record])
        ends[record.step + 1] = end
        events.append(_scalars(record, end))
    # Samples of a step without a record get the latest time.
    return events + [_samples(step, texts, ends.get(step, end)) for step, texts in samples]


def _scalars(record: StepRecord, wall_time: float) -> bytes:
    """Return a step's Event: a float32 scalar for each curve that was measured."""
    values = [{"tag": name, "simple_value": value} for name, value in record.curves().items()]
    return _event(values, record.step, wall_time)


def _samples(step: int, texts: Sequence[str], wall_time: float) -> bytes:
    """Return the Event of the texts after `step` steps, at the step of the last scalars."""
    return _event([_text("samples", list(map(_as_code, texts)))], max(0, step - 1), wall_time)


def _settings(settings: dict[str, Any], wall_time: float) -> list[bytes]:
    """Return all metadata as a table for the text page, and the hyperparameters as columns."""
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    rows = ["setting|value", "-|-", *(f"{name}|{_as_cell(settings[name])}" for name in settings)]
    session = SessionStartInfo(start_time_secs=wall_time)
    for name, value in settings.items():
        if not name.startswith(_HYPERPARAMETERS):
            continue
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            session.hparams[name].number_value = value
        else:
            text = str(value).encode(errors="replace").decode()
            session.hparams[name].string_value = text
    columns = {
        "tag": metadata.SESSION_START_INFO_TAG,
        "metadata": metadata.create_summary_metadata(HParamsPluginData(session_start_info=session)),
        "tensor": metadata.NULL_TENSOR,
    }
    table = _text("settings", ["\n".join(rows)])
    return [_event([value], 0, wall_time) for value in (table, columns)]


def _text(tag: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return a value that TensorBoard shows as Markdown, string [len(texts)]."""
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    tensor = {
        "dtype": DT_STRING,
        "tensor_shape": {"dim": [{"size": len(texts)}]},
        "string_val": [text.encode("utf-8", "replace") for text in texts],
    }
    return {"tag": tag, "metadata": create_summary_metadata("", ""), "tensor": tensor}


def _event(values: Sequence[dict[str, Any]], step: int, wall_time: float) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=wall_time, step=step, summary={"value": values}).SerializeToString()


def _as_code(text: str) -> str:
    """Return Markdown that shows a text unchanged."""
    return "".join(f"    {line}\n" for line in text.split("\n"))


def _as_cell(value: Any) -> str:
    """Return Markdown that shows a value unchanged in a table."""
    return f"`{value}`".replace("|", "&#124;").replace("\n", " ")
