"""What a bar leaves on a terminal."""

import os
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.terminal import Terminal

PROGRAM = """
import signal, sys
from app.cli.process import run_and_report
from app.progress import TokenProgress

def work():
    with TokenProgress(100) as progress:
        progress.show(int(sys.argv[1]), None)
        if sys.argv[1] != "100":
            print("\\a", end="", flush=True)
            signal.pause()

sys.exit(run_and_report(work))
"""
CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize("columns", (30, 80))
def test_ctrl_c_erases_the_bar_and_its_echo(columns: int) -> None:
    with closing(Terminal(columns)) as terminal:
        command = [sys.executable, "-c", PROGRAM, "50"]
        with terminal.start(command, CHECKOUT, os.environ) as process:
            terminal.wait_for(rb"\a")
            terminal.press_ctrl_c()
            assert process.wait(300) == 130
        assert "^C" in terminal.written.decode()
        assert terminal.screen() == ["stopped"]


def test_a_bar_that_is_complete_stays() -> None:
    with closing(Terminal(80)) as terminal:
        code = terminal.run([sys.executable, "-c", PROGRAM, "100"], CHECKOUT, os.environ)
        (bar,) = terminal.screen()
        assert code == 0
        assert bar.startswith("100%")
        assert "100/100" in bar
