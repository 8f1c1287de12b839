"""Real `python -m app train` processes, watched through the lines they print."""

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.runs.metrics import PAUSES
from tests.process_tree import children

TINY = {
    "MODEL_CONTEXT_LENGTH": "32",
    "MODEL_NUM_LAYERS": "2",
    "MODEL_EMBD_SIZE": "16",
    "MODEL_NUM_HEADS": "2",
    "TRAIN_TOKENS_PER_STEP": "256",
    "TRAIN_MICRO_BATCH_SIZE": "4",
    "TRAIN_MAX_STEPS": "10",
    "TRAIN_LEARNING_RATE": "1e-2",
    "TRAIN_WARMUP_STEPS": "2",
    "TRAIN_DATASET_DIR": "text",
    "TRAIN_RUN_NAME": "run",
    "TRAIN_DEVICE": "cpu",
    "TRAIN_COMPILE": "false",
    "TRAIN_PRECISION": "float32",
    "TRAIN_VAL_TOKENS": "512",
    "TRAIN_VAL_EVERY": "5",
    "TRAIN_SAMPLE_EVERY": "5",
    "TRAIN_CHECKPOINT_EVERY": "4",
    "SAMPLE_MAX_TOKENS": "12",
    "SAMPLE_NUM_SAMPLES": "1",
}

TRAIN = (sys.executable, "-m", "app", "train")
CHECKOUT = Path(__file__).parents[2]
# torch and earlier tests in this process set the caches.
_NOT_INHERITED = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
TIMINGS = {"step_ms", "data_ms", *PAUSES, "tokens_per_second", "mfu", "memory_bytes"}


class Watched(subprocess.Popen[str]):
    """A process that cannot print a line before the test has read the last but one.

    Otherwise, when a signal follows a line, the process might be steps further or at its end.

    Args:
        command: what runs.
        in_step: False if it may print ahead: the test waits for other processes meanwhile.
        options: of Popen.
    """

    def __init__(self, command: Sequence[str], *, in_step: bool = True, **options: Any) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | (os.O_DIRECT if in_step else 0))
        if in_step:
            # With O_DIRECT each write takes a page of the pipe, and it gets one page.
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1)
        super().__init__(command, stdout=writer, text=True, **options)
        os.close(writer)
        self.stdout = os.fdopen(reader)
        self._ahead = b""

    def wait_for(self, beginning: str) -> str:
        """Read until a line with this beginning is printed; return everything up to it."""
        lines = []
        while line := self._line():
            lines.append(line)
            if line.startswith(beginning):
                return "".join(lines)
        pytest.fail(f"no line began with {beginning!r}: {''.join(lines)}{self.end()}")

    def _line(self) -> str:
        assert self.stdout is not None
        while b"\n" not in self._ahead and (part := os.read(self.stdout.fileno(), 1 << 16)):
            self._ahead += part
        line, newline, self._ahead = self._ahead.partition(b"\n")
        return (line + newline).decode()

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and everything printed since."""
        out, err = self.communicate(timeout=300)
        return self.returncode, self._ahead.decode() + out + (err or "")


class Process:
    """A training process that is watched through the lines it prints.

    Args:
        data_dir: DATA_DIR, and where it runs.
        command: that trains, or launches those that do.
        in_step: as for Watched.
        changes: of TINY's settings, and other variables.
    """

    def __init__(
        self,
        data_dir: Path,
        command: Sequence[str] = TRAIN,
        in_step: bool = True,
        /,
        **changes: object,
    ) -> None:
        settings = TINY | {name: str(value) for name, value in changes.items()}
        environment = {
            **{name: value for name, value in os.environ.items() if name not in _NOT_INHERITED},
            **settings,
            "DATA_DIR": str(data_dir),
        }
        self.run_dir = data_dir / "runs" / settings["TRAIN_RUN_NAME"]
        self.process = Watched(
            command,
            in_step=in_step,
            cwd=data_dir,
            env=environment,
            stderr=subprocess.PIPE,
        )

    def signal_at(self, beginning: str, number: signal.Signals) -> None:
        """Send a signal once a line with this beginning is printed."""
        self.wait_for(beginning)
        self.process.send_signal(number)

    def workers(self) -> dict[int, int]:
        """Return the process number of each rank that it has launched."""
        workers = {}
        for place in children().get(self.process.pid, ()):
            try:
                words = (place / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [word[5:] for word in words if word.startswith(b"RANK=")]
            if ranks:
                workers[int(ranks[0])] = int(place.name)
        return workers

    def wait_for(self, beginning: str) -> str:
        return self.process.wait_for(beginning)

    def end(self) -> tuple[int, str]:
        return self.process.end()


Start = Callable[..., Process]
Unbroken = Callable[..., Path]


def free_port() -> int:
    """Return a random free port of the range of cloud/train.slurm; tests run side by side."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port is taken")


def run_to_end(start: Start, **changes: object) -> Process:
    process = start(**changes)
    code, output = process.end()
    assert code == 0, output
    return process


def assert_same_run(one: Path, other: Path, last_step: int = 10) -> None:
    """Assert that weights, optimizer state, samples and all metrics but timings are identical."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        place = Path("checkpoints", f"step-{last_step:06d}", file)
        assert (one / place).read_bytes() == (other / place).read_bytes()
    assert (one / "samples.txt").read_bytes() == (other / "samples.txt").read_bytes()
    assert measured(one) == measured(other)


def losses(run_dir: Path) -> Tensor:
    """Return the training losses, float32 [steps]."""
    return torch.tensor([line["train_loss"] for line in measured(run_dir)])


def measured(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(len(records)))
    return [
        {name: value for name, value in record.items() if name not in TIMINGS} for record in records
    ]
