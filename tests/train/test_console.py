"""What a person sees: in a real terminal of any width, and without one."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.train.processes import CHECKOUT, TINY, Start, measured, run_to_end

PRICE = {"TRAIN_PRICE_PER_HOUR": "3600"}  # one a second


def screen_of(data_dir: Path, columns: int, **changes: str) -> str:
    """All that a training process writes to a terminal of so many columns."""
    keyboard, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | TINY | changes
    environment |= {"DATA_DIR": str(data_dir), "PYTHONPATH": str(CHECKOUT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "train"],
        cwd=data_dir,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            written += os.read(keyboard, 65536)
        except OSError:  # the other side is closed
            break
    os.close(keyboard)
    assert process.wait() == 0, written.decode()
    return written.decode()


def lines_of(screen: str) -> list[str]:
    """What stood in a line at some time, without the commands that move the cursor."""
    return [
        line.rstrip()
        for line in re.split(r"[\r\n]+|\x1b\[A", re.sub(r"\x1b\[[0-9;]*[B-Za-z]", "", screen))
        if line.strip()
    ]


@pytest.mark.parametrize("columns", (60, 80, 200))
def test_a_terminal_has_a_bar_and_figures_that_fit(data_dir: Path, columns: int) -> None:
    lines = lines_of(screen_of(data_dir, columns, **PRICE))
    bars = [line for line in lines if re.match(r" *\d+% ", line)]
    figures = [line for line in lines if line.startswith("loss ")]
    steps = [line for line in lines if line.startswith("step:")]
    assert max(map(len, bars + figures + steps)) <= columns
    assert re.fullmatch(r"100% █+ 10/10 steps, \d\d:\d\d so far, 00:00 left", bars[-1])
    assert re.match(r"loss \d+\.\d{4}  held-out \d+\.\d{4}  [\d.]+k? tok/s", figures[-1])
    if columns >= 80:
        assert re.search(r" [\d.]+ GiB  cost \d+\.\d\d$", figures[-1])
    assert steps[0].startswith("step:0/10 train_loss:")
    assert steps[-1].startswith("step:9/10 train_loss:")
    if columns == 200:
        assert re.search(r" grad_norm:\S+ memory:\S+GiB cost:\d+\.\d\d$", steps[-1])


def test_without_a_terminal_every_step_has_its_whole_line(start: Start) -> None:
    process = start(TRAIN_MAX_STEPS=3)
    code, output = process.end()
    assert code == 0, output
    pattern = (
        r"step:{}/3 train_loss:\d+\.\d{{4}} train_time:\d+ms token/s:\d+\.\d\d "
        r"lr:\S+ grad_norm:\d+\.\d{{3}} memory:\d+\.\dGiB"
    )
    lines = [line for line in output.splitlines() if line.startswith("step:")]
    assert len(lines) == 3
    for step, line in enumerate(lines):
        assert re.fullmatch(pattern.format(step), line)
    assert "\x1b" not in output
    assert "%" not in output


def cost_of(output: str) -> list[float]:
    return [float(cost) for cost in re.findall(r" cost:(\d+\.\d\d)$", output, re.MULTILINE)]


def test_the_cost_is_that_of_all_starts(start: Start) -> None:
    first = start(**PRICE, TRAIN_MAX_STEPS=4)
    before = cost_of(first.end()[1])
    assert before == sorted(before)
    assert before[0] > 0
    after = cost_of(start(**PRICE).end()[1])
    assert len(after) == 6
    # A start alone takes longer than the last line of the one before.
    assert after[0] > before[-1]


def test_the_price_changes_nothing_of_the_run(start: Start) -> None:
    plain = run_to_end(start, TRAIN_RUN_NAME="plain")
    priced = run_to_end(start, **PRICE)
    assert measured(plain.run_dir) == measured(priced.run_dir)
