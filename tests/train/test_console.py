"""The console of a run on a terminal of any width, on one that is lost, and on none."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest

from app.runs.metrics import StepRecord
from app.streams import Output
from app.train.console import Console
from tests.train.processes import TINY

STEPS = 3


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=524_288 * (step + 1),
        train_loss=10.98114,
        lr=3e-4,
        grad_norm=1.2345,
        step_ms=63_757.4,
        tokens_per_second=8223.23,
        mfu=0.4567,
        memory_bytes=3 << 30,
    )


class Terminal:
    """A pseudo terminal that is this process's standard output and error."""

    def __init__(self, columns: int) -> None:
        self.keyboard, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(terminal, "w")
        self.written = b""
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # Reading fails once the other side is closed.
        with suppress(OSError):
            while part := os.read(self.keyboard, 65536):
                self.written += part

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()
        self._reader.join()
        os.close(self.keyboard)

    def lines(self) -> list[str]:
        """Return what stood in a line at some time, without the commands that move the cursor."""
        text = re.sub(r"\x1b\[[0-9;]*[B-Za-z]", "", self.written.decode())
        return [line.rstrip() for line in re.split(r"[\r\n]+|\x1b\[A", text) if line.strip()]


@contextmanager
def terminal_of(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    with monkeypatch.context() as patch, closing(Terminal(columns)) as terminal:
        for name in ("stdout", "stderr", "__stdout__"):
            patch.setattr(sys, name, terminal.stream)
        yield terminal


def show_run(console: Console) -> None:
    with closing(console):
        console.print_line("Using device: cpu")
        for step in range(STEPS):
            console.step(record(step))
            console.evaluated(step + 1, 9.87654, 16_384)


def test_everything_fits_a_terminal_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in range(1, 201):
        with terminal_of(columns, monkeypatch) as terminal:
            show_run(Console(0, STEPS, price_per_hour=0.0, device_bytes=80 << 30))
        lines = terminal.lines()
        steps = [line for line in lines if line.startswith("step:")]
        assert steps[0].startswith("step:0/3"), columns
        assert steps[-1].startswith("step:2/3"), columns
        # Of the fields at least the first one is shown.
        assert max(map(len, steps)) <= max(columns, len("step:0/3")), columns
        others = set(lines) - set(steps) - {"Using device: cpu"}
        others = {line for line in others if not line.startswith("after ")}
        # tqdm leaves the last column free, and takes a width of 0 for an unknown one.
        assert columns == 1 or max(map(len, others)) <= columns, columns


def test_a_wide_terminal_shows_the_bar_and_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal_of(200, monkeypatch) as terminal:
        show_run(Console(0, STEPS, price_per_hour=0.0, device_bytes=80 << 30))
    lines = terminal.lines()
    assert any(re.fullmatch(r"100% █+ 3/3 steps, 00:0\d so far, 00:00 left", one) for one in lines)
    assert "loss 10.9811  held-out 9.8765  8.22k tok/s  MFU 45.7%  3.0 GiB (4%)  cost 0.00" in lines
    assert lines.count("after 3 steps: val_loss:9.8765 (on 16,384 tokens)") == 1
    assert (
        "step:2/3 train_loss:10.9811 train_time:63757ms token/s:8223.23 lr:3.00e-04 "
        "grad_norm:1.234 mfu:45.7% memory:3.0GiB cost:0.00"
    ) in lines


def test_without_a_terminal_each_step_has_its_whole_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_run(Console(0, STEPS))
    printed = capsys.readouterr()
    assert printed.err == ""
    expected = ["Using device: cpu"]
    for step in range(STEPS):
        expected += [
            f"step:{step}/3 train_loss:10.9811 train_time:63757ms token/s:8223.23 lr:3.00e-04 "
            "grad_norm:1.234 mfu:45.7% memory:3.0GiB",
            f"after {step + 1} steps: val_loss:9.8765 (on 16,384 tokens)",
        ]
    assert printed.out.splitlines() == expected


def test_a_rank_other_than_zero_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show_run(Console(0, STEPS, quiet=True))
    assert capsys.readouterr() == ("", "")


def test_the_cost_is_that_of_all_starts(capsys: pytest.CaptureFixture[str]) -> None:
    costs = []
    for earlier_hours in (0, 1000):
        console = Console(0, STEPS, price_per_hour=2.5, earlier_seconds=3600.0 * earlier_hours)
        show_run(console)
        output = capsys.readouterr().out
        costs.append([float(one) for one in re.findall(r" cost:(\d+\.\d\d)$", output, re.M)])
    this_start, all_starts = costs
    assert len(this_start) == len(all_starts) == STEPS
    assert min(all_starts) >= 2500 > max(this_start)


def test_a_lost_terminal_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    keyboard, terminal = pty.openpty()
    stream = Output(os.fdopen(terminal, "wb"))
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr", "__stdout__"):
            patch.setattr(sys, name, stream)
        console = Console(0, STEPS)
        os.close(keyboard)
        show_run(console)
    with suppress(OSError):
        stream.close()


@pytest.mark.processes
def test_a_process_on_a_terminal_shows_a_bar_and_figures(data_dir: Path) -> None:
    environment = os.environ | TINY | {"DATA_DIR": str(data_dir)}
    with closing(Terminal(80)) as terminal:
        process = subprocess.run(
            [sys.executable, "-m", "app", "train"],
            cwd=data_dir,
            env=environment | {"TERM": "xterm", "TRAIN_PRICE_PER_HOUR": "3600"},
            stdin=terminal.stream,
            stdout=terminal.stream,
            stderr=terminal.stream,
            check=False,
        )
    lines = terminal.lines()
    assert process.returncode == 0, lines
    bars = [line for line in lines if re.match(r" *\d+% ", line)]
    figures = [line for line in lines if line.startswith("loss ")]
    steps = [line for line in lines if line.startswith("step:")]
    assert max(map(len, bars + figures + steps)) <= 80
    assert re.fullmatch(r"100% █+ 10/10 steps, \d\d:\d\d so far, 00:00 left", bars[-1])
    pattern = r"loss \d+\.\d{4}  held-out \d+\.\d{4}  [\d.]+k? tok/s  [\d.]+ GiB  cost \d+\.\d\d"
    assert re.fullmatch(pattern, figures[-1])
    assert steps[0].startswith("step:0/10 train_loss:")
    assert steps[-1].startswith("step:9/10 train_loss:")
