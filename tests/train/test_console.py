"""The console of a run on a terminal of any width, on one that is lost, and on none."""

import io
import os
import pty
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from app.runs.metrics import StepRecord
from app.streams import Output
from app.train.console import Console
from tests.terminal import Terminal
from tests.train.processes import TINY, TRAIN

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


@contextmanager
def terminal_of(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    with monkeypatch.context() as patch, closing(Terminal(columns)) as terminal:
        for name in ("stdout", "stderr", "__stdout__"):
            patch.setattr(sys, name, terminal.stream)
        yield terminal


class _Recorder(io.FileIO):
    """The file of a terminal, with a list of what is written to it at once."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal.stream.fileno(), "w", closefd=False)
        self.written: list[bytes] = []

    def write(self, part: Any, /) -> int:
        self.written.append(bytes(part))
        return super().write(part)


def test_a_signal_at_any_moment_leaves_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal_of(80, monkeypatch) as terminal:
        recorder = _Recorder(terminal)
        stream = TextIOWrapper(io.BufferedWriter(recorder), line_buffering=True)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        with closing(Console(0, STEPS)) as console:
            console.print_line("Using device: cpu\n125 parameters")
            for step in range(STEPS - 1):
                console.step(record(step), 7199.0)
                console.evaluated(step + 1, 9.87654, 16_384)
    assert len(recorder.written) > 10
    for count in range(len(recorder.written) + 1):
        written = b"".join(recorder.written[:count]) + b"^C\r\x1b[Jstopping\n"
        terminal.written = written.replace(b"\n", b"\r\n")
        screen = terminal.screen()
        assert screen[-1] == "stopping"
        assert not [line for line in screen if "so far" in line or "tok/s" in line], screen


def show_run(console: Console) -> None:
    with closing(console):
        console.print_line("Using device: cpu")
        for step in range(STEPS):
            console.step(record(step), 7199.0)
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
    bar = r" 33% \S+ +1/3 steps, 00:0\d so far, 1:\d\d:\d\d left, until .*\d\d:\d\d \S+"
    assert any(re.fullmatch(bar, line) for line in lines)
    assert re.fullmatch(r"100% █+ 3/3 steps, 00:0\d so far", terminal.screen()[-1])
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


def test_the_first_step_is_waited_for_with_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        terminal_of(80, monkeypatch) as terminal,
        closing(Console(0, STEPS, waiting_for="the compiler")),
    ):
        terminal.wait_for(rb"waiting for the compiler: [1-9]\d* s")
    # The run did not complete a step.
    assert terminal.screen() == []


def test_what_the_run_takes_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Console(0, STEPS, price_per_hour=2.0, earlier_seconds=36_000.0)) as console:
        console.expect(7200.0, 1_572_864)
        console.total(1_572_864)
    expected, total = capsys.readouterr().out.splitlines()
    pattern = (
        r"expected: 3 steps, 1,572,864 tokens, 12 h (\d+ min )?in all, until .*\d\d:\d\d \S+, "
    )
    assert re.fullmatch(pattern + r"cost 2[45]\.\d\d", expected)
    assert re.fullmatch(
        r"Whole run: 3 steps, 1,572,864 tokens, 10 h( \d+ min)?, cost 2[01]\.\d\d", total
    )


def test_a_run_of_a_million_years_is_expected_too(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Console(0, STEPS)) as console:
        console.expect(3e13, 1)
    assert "in all, until 31 Dec 9998 " in capsys.readouterr().out


def test_at_the_end_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal_of(120, monkeypatch) as terminal, closing(Console(0, STEPS)) as console:
        console.step(record(STEPS - 1), 0.0)
    bars = [line for line in terminal.lines() if "00:00 left, until " in line]
    assert bars
    assert not any("1970" in line for line in bars)


def environment_of(data_dir: Path, **changes: str) -> dict[str, str]:
    return os.environ | TINY | {"DATA_DIR": str(data_dir), "TRAIN_PRICE_PER_HOUR": "3600"} | changes


@pytest.mark.processes
def test_a_process_on_a_terminal_shows_a_bar_and_figures(data_dir: Path) -> None:
    with closing(Terminal(80)) as terminal:
        code = terminal.run(TRAIN, data_dir, environment_of(data_dir))
    lines, screen = terminal.lines(), terminal.screen()
    assert code == 0, lines
    bars = [line for line in lines if re.match(r" *\d+% ", line)]
    figures = [line for line in lines if line.startswith("loss ")]
    steps = [line for line in lines if line.startswith("step:")]
    assert max(map(len, bars + figures + steps)) <= 80
    pattern = r"loss \d+\.\d{4}  held-out \d+\.\d{4}  [\d.]+k? tok/s  [\d.]+ GiB  cost \d+\.\d\d"
    assert re.fullmatch(pattern, figures[-1])
    assert steps[0].startswith("step:0/10 train_loss:")
    assert steps[-1].startswith("step:9/10 train_loss:")
    # The bar that is complete stays; nothing else of it does.
    assert [line for line in screen if "so far" in line] == bars[-1:]
    assert re.fullmatch(r"100% █+ 10/10 steps, \d\d:\d\d so far", bars[-1])
    assert not any(line.startswith("loss ") for line in screen)


@pytest.mark.slow
@pytest.mark.processes
def test_ctrl_c_leaves_whole_lines_and_no_bar(data_dir: Path) -> None:
    environment = environment_of(data_dir, TRAIN_MAX_STEPS="9999", TRAIN_SAMPLE_EVERY="0")
    with closing(Terminal(80)) as terminal:
        with terminal.start(TRAIN, data_dir, environment) as process:
            terminal.wait_for(rb"expected: 9,999 steps")
            terminal.press_ctrl_c()
            code = process.wait(300)
        screen = terminal.screen()
    assert code == 130, screen
    assert not [line for line in screen if "^C" in line or "so far" in line or "█" in line]
    beginning = next(i for i, line in enumerate(screen) if line.startswith("stopping: "))
    stop = screen[beginning:]
    # Nothing but the step that was running, its evaluation, the checkpoint and the last line.
    assert sum(line.startswith(("step:", "after ", "stopp")) for line in stop) >= 3
    assert len(stop) <= 8
    assert any(line.startswith("stopped: ") for line in stop[-3:])
