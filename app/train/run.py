"""A run's folder: what it was started with, what it has measured, and where it continues."""

import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from torch import nn

from app.errors import ExitCode, UserError
from app.files import write_json
from app.train.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from app.train.metrics import MetricsLog
from app.train.optimizer import Optimizers

_PACKAGES = ("torch", "numpy", "tiktoken", "datasets", "pydantic-settings", "safetensors")


@dataclass(frozen=True)
class Identity:
    """What makes a run this run; it cannot continue with another.

    Attributes:
        dataset_fingerprint: of the tokens
        settings: name -> value of every setting that the losses depend on from the first step
    """

    dataset_fingerprint: str
    settings: dict[str, Any]

    def refuse_difference(self, run_dir: Path, state: dict[str, Any]) -> None:
        """Raise UserError that names what differs from a checkpoint's state."""
        before = state["identity"]
        now = self.as_state()
        differences = [
            f"{name} was {before.get(name)} and is now {now.get(name)}"
            for name in (*before, *(now.keys() - before.keys()))
            if name != "dataset_fingerprint" and before.get(name) != now.get(name)
        ]
        if before["dataset_fingerprint"] != self.dataset_fingerprint:
            differences.append("the dataset holds other tokens")
        if differences:
            raise UserError(
                f"{run_dir} is another run: {'; '.join(differences)}",
                "set TRAIN_RUN_NAME to a new name, or set these back to continue",
            )

    def as_state(self) -> dict[str, Any]:
        """For state.json."""
        return {"dataset_fingerprint": self.dataset_fingerprint, **self.settings}


class Run:
    """The folder of a run that this process owns.

    Args:
        folder: created if it is missing; what is there must be the same run.
        identity: of the run.
        keep_checkpoints: how many of the latest stay.
        resume: `never` refuses a run that has a checkpoint.

    Raises:
        UserError: the folder holds another run.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        keep_checkpoints: int,
        resume: Literal["auto", "never"],
    ) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.resumed_from = self._find_checkpoint(identity, resume)
        self._identity = identity
        self._keep = keep_checkpoints
        self.metrics = MetricsLog(folder / "metrics.jsonl", self.first_step)
        self._samples = folder / "samples.txt"
        self._cut_samples()

    def _find_checkpoint(
        self, identity: Identity, resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        steps = checkpoint_steps(self.checkpoints)
        if not steps:
            return None
        if resume == "never":
            raise UserError(
                f"{self.folder} exists and has a checkpoint of step {steps[-1]}",
                "set TRAIN_RUN_NAME to a new name, or TRAIN_RESUME=auto to continue it",
            )
        checkpoint = open_checkpoint(checkpoint_folder(self.checkpoints, steps[-1]))
        identity.refuse_difference(self.folder, checkpoint.state)
        return checkpoint

    @property
    def first_step(self) -> int:
        """The step to begin with: how many are completed."""
        return self.resumed_from.step if self.resumed_from else 0

    def save(
        self, step: int, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]
    ) -> Path:
        """Write the checkpoint after `step` steps, and drop the oldest beyond those kept."""
        folder = checkpoint_folder(self.checkpoints, step)
        if step not in checkpoint_steps(self.checkpoints):
            self.metrics.sync()
            identity = {"identity": self._identity.as_state(), "versions": versions()}
            save_checkpoint(folder, model, optimizers, {"step": step, **state, **identity})
            prune_checkpoints(self.checkpoints, self._keep)
        return folder

    def add_samples(self, step: int, texts: list[str]) -> None:
        """Append what the model wrote after `step` steps to samples.txt."""
        with self._samples.open("a", encoding="utf-8") as file:
            for text in texts:
                file.write(f"{_sample_heading(step)}\n{text}\n\n")

    def _cut_samples(self) -> None:
        if self._samples.exists():
            lines = self._samples.read_text(encoding="utf-8").splitlines(keepends=True)
            late = [i for i, line in enumerate(lines) if _is_after(line, self.first_step)]
            if late:
                self._samples.write_text("".join(lines[: late[0]]), encoding="utf-8")


def _sample_heading(step: int) -> str:
    return f"----- step {step} -----"


def _is_after(line: str, step: int) -> bool:
    words = line.split()
    return words[:2] == ["-----", "step"] and words[2].isdigit() and int(words[2]) > step


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def git_revision() -> str | None:
    """The commit of the program, with `-dirty` if files differ; None outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    described = subprocess.run(
        [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def write_run_settings(folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write settings.json: resolved settings, versions, and facts about device and model."""
    everything = {"settings": settings, "versions": versions(), "git_revision": git_revision()}
    write_json(folder / "settings.json", everything | facts)


@dataclass
class StopRequest:
    """Whether a signal has asked the program to stop; the loop looks between micro-batches."""

    exit_code: ExitCode | None = field(default=None)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.exit_code = ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM
        print("stopping: saving a checkpoint first; a second signal leaves at once", flush=True)
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_DFL)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request, for the length of the block."""
    request = StopRequest()
    before = {one: signal.signal(one, request._ask) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
