"""Real `python -m app train` processes, compiled and with default threads, killed and stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import TINY

CHECKOUT = Path(__file__).parents[2]
# torch and earlier tests in this process set the caches.
_NOT_INHERITED = {"RECIPE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
TIMINGS = {"step_ms", "tokens_per_second", "mfu", "memory_bytes"}


class Process:
    """A training process that is watched through the lines it prints."""

    def __init__(self, data_dir: Path, **changes: object) -> None:
        settings = TINY | {name: str(value) for name, value in changes.items()}
        environment = {
            **{name: value for name, value in os.environ.items() if name not in _NOT_INHERITED},
            **settings,
            "DATA_DIR": str(data_dir),
            "PYTHONPATH": str(CHECKOUT),
        }
        self.run_dir = data_dir / "runs" / settings["TRAIN_RUN_NAME"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", "train"],
            cwd=data_dir,
            env=environment,
            # A test that runs in the background may hand down an ignored SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def signal_at(self, beginning: str, number: signal.Signals) -> None:
        """Send a signal when a line that begins so is printed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(beginning):
                self.process.send_signal(number)
                return
        pytest.fail(f"no line began with {beginning!r}: {self.end()}")

    def end(self) -> tuple[int, str]:
        """Exit code, and everything printed since."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out + err


Start = Callable[..., Process]


@pytest.fixture
def start(data_dir: Path) -> Start:
    return lambda **changes: Process(data_dir, **changes)


def run_to_end(start: Start, **changes: object) -> Process:
    process = start(**changes)
    code, output = process.end()
    assert code == 0, output
    return process


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer state, samples and all metrics but timings are equal, bit for bit."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        place = Path("checkpoints/step-000010") / file
        assert (one / place).read_bytes() == (other / place).read_bytes()
    assert (one / "samples.txt").read_bytes() == (other / "samples.txt").read_bytes()
    assert measured(one) == measured(other)


def measured(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(len(records)))
    return [
        {name: value for name, value in record.items() if name not in TIMINGS} for record in records
    ]


def test_killed_twice_and_continued_equals_unbroken(start: Start) -> None:
    compiled = {"TRAIN_COMPILE": "true", "TRAIN_PRECISION": "bf16"}
    unbroken = run_to_end(start, **compiled, TRAIN_RUN_NAME="unbroken")
    # Killed after steps that no checkpoint holds: 4 and 8 are saved, 7 and 9 reached.
    for reached in ("step:6/", "step:8/"):
        killed = start(**compiled)
        killed.signal_at(reached, signal.SIGKILL)
        assert killed.end()[0] == -signal.SIGKILL
    continued = run_to_end(start, **compiled)
    assert_same_run(continued.run_dir, unbroken.run_dir)
    assert any((continued.run_dir.parents[1] / "cache" / "inductor").iterdir())


@pytest.mark.parametrize(
    ("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)), ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_a_checkpoint_and_the_run_continues(
    start: Start, number: signal.Signals, code: int
) -> None:
    unbroken = run_to_end(start, TRAIN_RUN_NAME="unbroken")
    stopped = start()
    stopped.signal_at("step:1/", number)
    found, output = stopped.end()
    assert found == code, output
    assert "Traceback" not in output
    saved = [path.name for path in (stopped.run_dir / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert len(measured(stopped.run_dir)) == int(saved[0].removeprefix("step-"))
    assert f"stopped: {stopped.run_dir / 'checkpoints' / saved[0]}" in output
    continued = run_to_end(start)
    assert_same_run(continued.run_dir, unbroken.run_dir)


def test_the_lock_of_a_killed_process_is_gone(start: Start) -> None:
    killed = start()
    killed.signal_at("step:0/", signal.SIGKILL)
    killed.end()
    run_to_end(start)
