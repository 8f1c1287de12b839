"""The console of a run: the original program's lines, and a bar on a terminal."""

import os
import shutil
import sys
import time
from contextlib import suppress
from threading import Event, Thread

from app.data.sequences import BatchPlan
from app.formats import format_clock, format_count, format_duration, format_gib, plural
from app.hardware.device import Device
from app.hardware.proc import process_seconds
from app.progress import Bar
from app.runs.metrics import StepRecord

# On a terminal the bar shows every step; more frequent lines would be unreadable.
_SECONDS_BETWEEN_LINES = 1.0
# The clocks of the bar move while a step takes long.
_SECONDS_BETWEEN_TICKS = 1.0
_BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {elapsed} so far{postfix}"


class Console:
    """Prints a line per step; on a terminal also a bar, the time left and the latest figures.

    Args:
        first_step: where this start continues the run.
        max_steps: number of steps of the run.
        quiet: print nothing, because another rank does.
        device_bytes: memory of the device; None if unknown.
        price_per_hour: price of the machine; None if unknown.
        earlier_seconds: what earlier starts spent on the run.
        waiting_for: what the first step waits for; shown on a terminal, with the seconds.
    """

    def __init__(
        self,
        first_step: int,
        max_steps: int,
        *,
        quiet: bool = False,
        device_bytes: int | None = None,
        price_per_hour: float | None = None,
        earlier_seconds: float = 0.0,
        waiting_for: str = "the first step",
    ) -> None:
        self._max_steps, self._quiet = max_steps, quiet
        self._device_bytes, self._price = device_bytes, price_per_hour
        self._began = time.perf_counter() - process_seconds() - earlier_seconds
        self._waiting_for, self._started = waiting_for, time.perf_counter()
        self._end: float | None = None
        self._is_terminal = sys.stdout.isatty()
        self._next_line = 0.0
        self._record: StepRecord | None = None
        self._val_loss: float | None = None
        self._bar = Bar(
            total=max_steps,
            initial=first_step,
            disable=True if quiet else None,
            dynamic_ncols=True,
            bar_format=_BAR,
        )
        self._closing = Event()
        self._clock = Thread(target=self._tick, name="console", daemon=True)
        if not self._bar.disable:
            self._clock.start()

    def print_line(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if not self._quiet:
            Bar.write(f"{line}\n", file=sys.stdout, end="")
            sys.stdout.flush()

    def plan(self, steps: int) -> None:
        """Show another number of steps of the run from now on."""
        self._max_steps = self._bar.total = steps
        self._bar.refresh()

    def step(self, record: StepRecord, seconds_left: float | None = None) -> None:
        """Print a step's line and move the bar; the rest of the run takes `seconds_left`."""
        self._record = record
        self._end = None if seconds_left is None else time.time() + seconds_left
        self._bar.n = record.step + 1
        line = step_line(record, self._max_steps) + self._cost(" cost:")
        is_last = record.step + 1 == self._max_steps
        is_due = is_last or time.monotonic() >= self._next_line
        if is_due and self._is_terminal:
            line = _fit(line.split(" "), " ", shutil.get_terminal_size().columns)
        if is_due or not self._is_terminal:
            self.print_line(line)
        if is_due:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            self._draw()

    @property
    def elapsed_seconds(self) -> float:
        """Return what the run has taken so far, over all its starts."""
        return time.perf_counter() - self._began

    def total(self, tokens: int) -> None:
        """Print what the whole run has taken: steps, tokens, time and cost."""
        self.print_line(
            f"Whole run: {plural(self._max_steps, 'step')}, {tokens:,} tokens, "
            f"{format_duration(self.elapsed_seconds)}{self._cost(', cost ')}"
        )

    def expect(self, seconds_left: float, tokens: int, basis: str = "") -> None:
        """Print what the whole run is expected to take: steps, tokens, time and cost.

        Args:
            seconds_left: how long the rest of it takes.
            basis: what the prediction is based on, if not on this start.
        """
        seconds = self.elapsed_seconds + seconds_left
        self.print_line(
            f"expected{basis}: {plural(self._max_steps, 'step')}, {tokens:,} tokens, "
            f"{format_duration(seconds)} in all, until {format_clock(time.time() + seconds_left)}"
            f"{self._cost(', cost ', seconds_left)}"
        )

    def evaluated(self, steps_completed: int, val_loss: float, num_tokens: int) -> None:
        """Print a held-out loss; the figures below the bar show it from the next step on."""
        on = f"(on {num_tokens:,} tokens)"
        self.print_line(f"after {steps_completed} steps: val_loss:{val_loss:.4f} {on}")
        self._val_loss = val_loss

    def close(self) -> None:
        """Erase the figures and the bar; it stays if the run is complete."""
        self._closing.set()
        if self._clock.is_alive():
            self._clock.join()
        self._bar.set_postfix_str("", refresh=False)
        self._bar.close()

    def _tick(self) -> None:
        while not self._closing.wait(_SECONDS_BETWEEN_TICKS):
            self._draw()

    def _draw(self) -> None:
        if self._bar.disable:
            return
        if self._end is not None:
            left = Bar.format_interval(max(0, self._end - time.time()))
            self._bar.set_postfix_str(
                f"{left} left, until {format_clock(self._end)}", refresh=False
            )
        # Not the width of stdout, which may be another terminal. This one may be lost.
        with suppress(OSError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            self._bar.below = _fit(self._fields(), "  ", width - 3)[: max(0, width - 3)]
        self._bar.refresh()

    def _fields(self) -> list[str]:
        """Return the latest figures, most important first; a narrow terminal drops the rest."""
        if (record := self._record) is None:
            return [f"waiting for {self._waiting_for}: {time.perf_counter() - self._started:.0f} s"]
        fields = [f"loss {record.train_loss:.4f}"]
        if self._val_loss is not None:
            fields.append(f"held-out {self._val_loss:.4f}")
        fields.append(f"{format_count(record.tokens_per_second or 0)} tok/s")
        if record.mfu is not None:
            fields.append(f"MFU {record.mfu:.1%}")
        memory = record.memory_bytes or 0
        part = f" ({memory / self._device_bytes:.0%})" if self._device_bytes else ""
        fields.append(f"{format_gib(memory)}{part}")
        return fields + list(filter(None, [self._cost("cost ")]))

    def _cost(self, name: str, seconds_left: float = 0.0) -> str:
        if self._price is None:
            return ""
        hours = (self.elapsed_seconds + seconds_left) / 3600
        return f"{name}{self._price * hours:.2f}"


def _fit(fields: list[str], separator: str, width: int) -> str:
    """Join as many of the fields as fit into the width."""
    line = fields[0]
    for field in fields[1:]:
        if len(line) + len(separator) + len(field) > width:
            break
        line += separator + field
    return line


def introduction(
    device: Device, plan: BatchPlan, context_length: int, num_parameters: int, compiling: str
) -> str:
    """Return a run's opening lines; the first ones match the original program's."""
    ranks = f"{plan.world_size} x " if plan.world_size > 1 else ""
    deterministic = "deterministic" if device.deterministic else "not deterministic"
    return (
        f"Using device: {device.torch_device.type}\n"
        f"Total batch size: {plan.sequences_per_step * context_length}\n"
        f"Tokens per micro-batch: {plan.micro_batch_size * context_length}\n"
        f"Gradient accumulation steps: {plan.accumulation_steps}\n"
        f"{ranks}{device.name}, {device.precision}, {deterministic}; "
        f"{num_parameters:,} parameters\n{compiling}"
    )


def step_line(record: StepRecord, max_steps: int) -> str:
    """Return a step's line, which begins like the original program's."""
    mfu = f" mfu:{record.mfu:.1%}" if record.mfu is not None else ""
    grad_norm = "inf" if record.grad_norm is None else f"{record.grad_norm:.3f}"
    skipped = f" skipped:fp16_overflow loss_scale:{record.loss_scale:g}" if record.skipped else ""
    return (
        f"step:{record.step}/{max_steps} train_loss:{record.train_loss:.4f} "
        f"train_time:{record.step_ms:.0f}ms token/s:{record.tokens_per_second:.2f} "
        f"lr:{record.lr:.2e} grad_norm:{grad_norm}{skipped}{mfu} "
        f"memory:{format_gib(record.memory_bytes or 0).replace(' ', '')}"
    )


def summary(seconds: float, tokens: int) -> str:
    """Return the original program's last three lines."""
    return (
        f"Total time: {seconds:.2f}s ({seconds / 60:.2f} minutes)\n"
        f"Total tokens processed: {tokens:,}\n"
        f"Average tokens/sec: {tokens / seconds:.2f}"
    )
