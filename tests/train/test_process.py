"""Real `python -m app train` processes, compiled and with default threads, killed and stopped."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from tests.train.processes import (
    TINY,
    Start,
    Unbroken,
    assert_same_run,
    losses,
    measured,
    run_to_end,
)

pytestmark = pytest.mark.processes


def test_a_run_that_is_killed_and_continued_equals_an_unbroken_one(
    start: Start, unbroken: Unbroken
) -> None:
    killed = start()
    killed.signal_at("step:6/", signal.SIGKILL)
    assert killed.end()[0] == -signal.SIGKILL
    assert_same_run(run_to_end(start).run_dir, unbroken())


@pytest.mark.slow
def test_a_compiled_run_that_is_killed_twice_and_continued_equals_an_unbroken_one(
    start: Start,
) -> None:
    threads = len(os.sched_getaffinity(0))
    compiled = {
        "TRAIN_COMPILE": "true",
        "TRAIN_PRECISION": "bf16",
        "OMP_NUM_THREADS": threads,
    }
    unbroken = run_to_end(start, **compiled, TRAIN_RUN_NAME="unbroken")
    # Checkpoints are saved after 4 and 8 steps, so that steps 4 to 6, and 8, are lost.
    for reached in ("step:6/", "step:8/"):
        killed = start(**compiled)
        killed.signal_at(reached, signal.SIGKILL)
        assert killed.end()[0] == -signal.SIGKILL
    continued = run_to_end(start, **compiled)
    assert_same_run(continued.run_dir, unbroken.run_dir)
    assert any((continued.run_dir.parents[1] / "cache" / "inductor").iterdir())


@pytest.mark.parametrize(
    ("number", "code"),
    (
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
    ),
)
def test_a_signal_saves_a_checkpoint_and_the_run_continues(
    start: Start, unbroken: Unbroken, number: signal.Signals, code: int
) -> None:
    stopped = start()
    stopped.signal_at("step:1/", number)
    exit_code, output = stopped.end()
    assert exit_code == code, output
    assert "Traceback" not in output
    saved = [path.name for path in (stopped.run_dir / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert len(measured(stopped.run_dir)) == int(saved[0].removeprefix("step-"))
    assert f"stopped: {stopped.run_dir / 'checkpoints' / saved[0]}" in output
    continued = run_to_end(start)
    assert_same_run(continued.run_dir, unbroken())


@pytest.mark.slow
def test_a_run_stopped_before_its_cooldown_and_continued_to_more_steps_equals_one_begun_so(
    start: Start, unbroken: Unbroken
) -> None:
    wsd = {"TRAIN_LR_SCHEDULE": "wsd", "TRAIN_COOLDOWN": 0.3}
    stopped = start(**wsd)
    stopped.signal_at("step:4/", signal.SIGTERM)
    assert stopped.end()[0] == 143
    continued = run_to_end(start, **wsd, TRAIN_MAX_STEPS=20)
    assert_same_run(continued.run_dir, unbroken(**wsd, TRAIN_MAX_STEPS=20), last_step=20)


@pytest.mark.slow
def test_a_branch_trains_in_several_processes_and_continues_after_a_kill(
    start: Start, unbroken: Unbroken
) -> None:
    wsd = {"TRAIN_LR_SCHEDULE": "wsd", "TRAIN_COOLDOWN": 0.3}
    run_to_end(start, **wsd)
    branch = {
        "TRAIN_MAX_STEPS": 20,
        "TRAIN_RUN_NAME": "new",
        "TRAIN_BRANCH_FROM": "run",
        "TRAIN_PROCESSES": 2,
    }
    killed = start(**wsd, **branch)
    killed.wait_for("step:9/")
    os.kill(killed.workers()[0], signal.SIGKILL)
    killed.process.kill()
    assert killed.end()[0] == -signal.SIGKILL
    continued = run_to_end(start, **wsd, **branch)
    alone = unbroken(**wsd, TRAIN_MAX_STEPS=20)
    torch.testing.assert_close(losses(continued.run_dir), losses(alone), rtol=0, atol=1e-5)


def make_controlling_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_lost_terminal_saves_a_checkpoint(data_dir: Path) -> None:
    keyboard, terminal = os.openpty()
    environment = os.environ | TINY | {"DATA_DIR": str(data_dir)}
    process = subprocess.Popen(
        # After a stop in an evaluation the line of the step would be written by the next start.
        [sys.executable, "-m", "app", "train", "--max-steps", "100000", "--val-every", "0"],
        cwd=data_dir,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=make_controlling_terminal,
    )
    os.close(terminal)
    printed = b""
    # A terminal gets at most one line a second.
    while not re.search(rb"step:([5-9]|\d\d)", printed):
        printed += os.read(keyboard, 65536)
    os.close(keyboard)
    assert process.wait(timeout=300) == 143
    saved = [path.name for path in (data_dir / "runs/run/checkpoints").iterdir()]
    assert f"step-{len(measured(data_dir / 'runs/run')):06d}" in saved


def test_a_log_on_a_full_disk_does_not_end_the_run(data_dir: Path) -> None:
    environment = os.environ | TINY | {"DATA_DIR": str(data_dir)}
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "app", "train"]
        done = subprocess.run(command, cwd=data_dir, env=environment, stdout=full, check=False)
    assert (data_dir / "runs/run/checkpoints/step-000010").is_dir(), done


@pytest.mark.slow
def test_where_the_compiler_fails_a_run_is_that_without_it(
    start: Start, unbroken: Unbroken, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    process = start(TRAIN_COMPILE="true", CXX=compiler)
    code, output = process.end()
    assert code == 0, output
    assert (
        f"not compiled, and slower: torch.compile does not work: CXX='{compiler}' is not a C++ "
        "compiler; set CXX to the path of a compiler that works, or unset it\n"
    ) in output
    assert_same_run(process.run_dir, unbroken())
    settings = json.loads((process.run_dir / "settings.json").read_text(encoding="utf-8"))
    assert settings["settings"]["train"]["compile"] is False
