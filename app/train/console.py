"""The console of a run: the original's lines, and a bar on a terminal."""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from app.formats import format_count, format_gib
from app.hardware.proc import process_seconds

_GIB = 1 << 30
# On a terminal nobody reads faster; the bar has every step.
_SECONDS_BETWEEN_LINES = 1.0
_BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {elapsed} so far, {remaining} left"


def print_line(line: str) -> None:
    """Print a line at once."""
    with _whatever_becomes_of_the_screen():
        print(line, flush=True)


class Console:
    """Prints a line a step; on a terminal above a bar, the time left and the latest figures.

    Args:
        quiet: print nothing: another process does.
        device_bytes: memory of the device; None if unknown.
        price_per_hour: of the machine; None if unknown.
        earlier_seconds: what earlier starts have spent on the run.
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
    ) -> None:
        self._max_steps, self._quiet = max_steps, quiet
        self._device_bytes, self._price = device_bytes, price_per_hour
        self._earlier_seconds = earlier_seconds
        self._is_watched = sys.stdout.isatty()
        self._next_line = 0.0
        self._record: Mapping[str, Any] = {}
        self._val_loss: float | None = None
        self._bar, self._figures = (
            tqdm(
                total=max_steps,
                initial=first_step,
                disable=True if quiet else None,
                dynamic_ncols=True,
                smoothing=0.1,
                position=position,
                bar_format=form,
            )
            for position, form in enumerate((_BAR, "{desc}"))
        )

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if not self._quiet:
            with _whatever_becomes_of_the_screen():
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def step(self, record: Mapping[str, Any]) -> None:
        """Print a step's line and move the bar.

        What is added to the record later, its held-out loss, is seen with the next step.
        """
        line = step_line(record, self._max_steps) + self._cost_field(" cost:")
        is_last = record["step"] + 1 == self._max_steps
        if not self._is_watched:
            self.say(line)
        elif is_last or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            self.say(_cut(line.split(" "), " ", shutil.get_terminal_size().columns))
        self._val_loss = self._record.get("val_loss", self._val_loss)
        self._record = record
        with _whatever_becomes_of_the_screen():
            if self._bar.update():
                self._show_figures()

    def close(self) -> None:
        """Leave the bar as it is."""
        with _whatever_becomes_of_the_screen():
            if self._record and not self._bar.disable:
                self._val_loss = self._record.get("val_loss", self._val_loss)
                self._show_figures()
            self._figures.close()
            self._bar.close()

    def _show_figures(self) -> None:
        # Not stdout's width: that may be another terminal.
        width = os.get_terminal_size(sys.stderr.fileno()).columns
        self._figures.set_description_str(_cut(self._fields(), "  ", width - 1))

    def _fields(self) -> list[str]:
        """The latest figures; the last ones fall off where the terminal is narrow."""
        record, memory = self._record, self._record["memory_bytes"]
        fields = [f"loss {record['train_loss']:.4f}"]
        if self._val_loss is not None:
            fields.append(f"held-out {self._val_loss:.4f}")
        fields.append(f"{format_count(record['tokens_per_second'])} tok/s")
        if record["mfu"] is not None:
            fields.append(f"MFU {record['mfu']:.1%}")
        part = f" ({memory / self._device_bytes:.0%})" if self._device_bytes else ""
        fields.append(f"{format_gib(memory)}{part}")
        return fields + list(filter(None, [self._cost_field("cost ")]))

    def _cost_field(self, name: str) -> str:
        if self._price is None:
            return ""
        hours = (self._earlier_seconds + process_seconds()) / 3600
        return f"{name}{self._price * hours:.2f}"


def _cut(fields: list[str], between: str, width: int) -> str:
    """As many of the fields as fit side by side."""
    line = fields[0]
    for field in fields[1:]:
        if len(line) + len(between) + len(field) > width:
            break
        line += between + field
    return line


@contextmanager
def _whatever_becomes_of_the_screen() -> Iterator[None]:
    """A terminal that is lost or a log on a full disk does not end the training."""
    try:
        yield
    except BrokenPipeError:
        # Whoever reads the output has seen enough.
        raise
    except OSError:
        pass


def step_line(record: Mapping[str, Any], max_steps: int) -> str:
    """A step's line; it begins as the original program's did."""
    mfu = f" mfu:{record['mfu']:.1%}" if record["mfu"] is not None else ""
    return (
        f"step:{record['step']}/{max_steps} train_loss:{record['train_loss']:.4f} "
        f"train_time:{record['step_ms']:.0f}ms token/s:{record['tokens_per_second']:.2f} "
        f"lr:{record['lr']:.2e} grad_norm:{record['grad_norm']:.3f}{mfu} "
        f"memory:{record['memory_bytes'] / _GIB:.1f}GiB"
    )


def summary(seconds: float, tokens: int) -> str:
    """The original program's last three lines."""
    return (
        f"Total time: {seconds:.2f}s ({seconds / 60:.2f} minutes)\n"
        f"Total tokens processed: {tokens:,}\n"
        f"Average tokens/sec: {tokens / seconds:.2f}"
    )
