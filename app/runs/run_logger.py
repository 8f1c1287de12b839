"""The logger of a run: its settings, metrics, samples and TensorBoard events."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from app.files import AppendOnlyFile, write_json
from app.runs.checkpoint import Checkpoint
from app.runs.code import record_code
from app.runs.folder import RunFolder
from app.runs.metrics import MetricsLog, StepRecord, total_seconds
from app.runs.samples import format_samples, read_samples
from app.runs.tensorboard import EventLog
from app.runs.tracking import Tracker


class RunLogger:
    """Writes a run's settings, metrics, samples and events. Rank 0 owns it.

    If the disk refuses a line or a sample, it is kept and written with the next one.

    Args:
        checkpoint: where the run continues; metrics and samples after it are cut off.
        metadata: the content of settings.json.
        tracker: trackio, wandb or none.

    Attributes:
        records: those of earlier processes, until this one adds its first step
        earlier_seconds: time that earlier processes spent on the steps kept
        skipped: updates that were skipped because gradients overflowed, by any process

    Raises:
        UserError: lines of metrics.jsonl are missing or damaged; in that case nothing is modified.
    """

    def __init__(
        self,
        run: RunFolder,
        checkpoint: Checkpoint | None,
        metadata: dict[str, Any],
        print_line: Callable[[str], None],
        tracker: str = "none",
    ) -> None:
        self._tracker_kind = tracker
        self._tracker: Tracker | None = None
        self._run, self._metadata, self._print_line = run, metadata, print_line
        if checkpoint is None and run.metrics.exists() and run.metrics.stat().st_size:
            # There is nothing to continue from, but the file may be all that is left of a long run.
            earlier = len(list(run.path.glob("metrics.before-*.jsonl")))
            run.metrics.rename(run.path / f"metrics.before-{earlier + 1}.jsonl")
        steps, samples_bytes = 0, 0
        if checkpoint:
            steps, samples_bytes = checkpoint.state.metrics_lines, checkpoint.state.samples_bytes
        self._metrics = MetricsLog(run.metrics, steps)
        self._samples = AppendOnlyFile(run.samples, samples_bytes)
        self.records = self._metrics.records
        self._events: EventLog | None = None
        self.earlier_seconds = total_seconds(self.records)
        self.skipped = sum(bool(record.skipped) for record in self.records)
        record_code(run, checkpoint)
        write_json(run.settings, metadata)

    def note(self, **facts: int) -> None:
        """Add facts to settings.json."""
        self._metadata |= facts
        with suppress(OSError):
            write_json(self._run.settings, self._metadata)

    def add_step(self, record: StepRecord) -> None:
        """Append a step's line to metrics.jsonl, and its points to TensorBoard's events."""
        self.skipped += bool(record.skipped)
        # Events are replaced only after the first step, so a failed start changes nothing.
        if self._events is None:
            with suppress(OSError):
                samples = read_samples(self._run.samples)
                self._events = EventLog(
                    self._run.tensorboard, self.records, samples, self._metadata
                )
        if self._events is None:
            self.records.append(record)
        else:
            self.records.clear()
            self._events.append(record)
        try:
            self._metrics.append(record)
        except OSError as error:
            self._warn(error)
        if self._tracker:
            self._tracker.check()
        elif self._tracker_kind != "none":
            self._tracker = Tracker(self._tracker_kind, self._run, self._print_line)

    def add_samples(self, step: int, texts: list[str]) -> None:
        """Append the texts that the model generated after `step` steps to samples.txt."""
        if self._events is not None:
            self._events.append_samples(step, texts)
        try:
            self._samples.append(format_samples(step, texts))
        except OSError as error:
            self._warn(error)

    def sync(self) -> tuple[int, int]:
        """Make metrics and samples durable; return their lines and bytes for a checkpoint.

        Raises:
            OSError: the disk is full or fails.
        """
        return self._metrics.sync(), self._samples.sync()

    def close(self) -> None:
        """Wait a limited time for the tracker to finish. The files stay open."""
        if self._tracker:
            self._tracker.close()

    def _warn(self, error: OSError) -> None:
        self._print_line(
            f"warning: {error}; the entry is kept and will be written once there is room"
        )
