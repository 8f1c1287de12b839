"""The program from Python: prepare and train as the commands do, and load a trained model.

`from app import load, prepare, train` imports the functions from here; after `pip install` it is
`from gpt_compose import load, prepare, train`.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from app.cli.commands import COMMANDS
from app.containers import is_installed, program
from app.errors import AppError, ExhaustedError, ExitCode, NetworkError, NotFiniteError, UserError
from app.runs.checkpoints import latest_checkpoint
from app.runs.metrics import StepRecord, read_metrics
from app.settings.settings import GROUPS, Settings
from app.settings.sources import flag_name, resolve, suggestion
from app.signals import on_stop_signals
from app.tools.latest_run import with_latest_run

if TYPE_CHECKING:
    from app.inference.loaded import LoadedModel

Setting = str | float | Path | list[float] | tuple[float, ...] | None
_ERRORS: dict[int, type[AppError]] = {
    it.exit_code: it for it in (UserError, NotFiniteError, ExhaustedError, NetworkError)
}


@dataclass(frozen=True)
class Run:
    """A run that has been trained.

    Attributes:
        folder: its folder, with the checkpoints, metrics.jsonl and settings.json
    """

    folder: Path

    @property
    def metrics(self) -> list[StepRecord]:
        """Return the measurements of each step."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def val_loss(self) -> float | None:
        """Return the last held-out loss, in nats per token; None if none was measured."""
        return next((it.val_loss for it in reversed(self.metrics) if it.val_loss is not None), None)


def prepare(dataset: str | Path | None = None, **settings: Setting) -> Path:
    """Turn text into token shards, as the command `prepare` does, and return their folder.

    Args:
        dataset: a local file, folder or glob; a dataset of the Hub; or stdlib, Python's own source.
        settings: the command's settings, by the names of their flags: total_tokens="20M". They
            count before the environment, .env and a recipe, which apply as they do to the command.

    Raises:
        AppError: UserError for a wrong setting or text, NetworkError, ExhaustedError.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    return _run_command("prepare", {"dataset": dataset, **settings}).prepare_dir.absolute()


def train(**settings: Setting) -> Run:
    """Train a GPT, or continue a run that exists, as the command `train` does, and return the run.

    It trains in a process of its own, or in one per GPU: what it did to torch, the GPU's memory and
    signal handlers ends with it, and a notebook outlives a run that fails. Its output appears here.

    Args:
        settings: the settings of training and of the model, by the names of their flags:
            recipe="demo", max_steps=20, run_name="a". They count before the environment, .env and a
            recipe, which apply as they do to the command.

    Raises:
        AppError: UserError for wrong settings or data, NotFiniteError, ExhaustedError.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved; the same call continues. SIGTERM
            saves as well, and then ends this process. An error while saving is raised instead.
    """
    return Run(_run_command("train", settings).run_dir.absolute())


def load(
    run: str | Path | None = None,
    *,
    step: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> "LoadedModel":
    """Load the model of a run, in evaluation mode and float32, and its tokenizer.

    Args:
        run: the run's name below DATA_DIR/runs, or its folder; by default the latest run.
        step: the checkpoint's step; by default the last one, or with TRAIN_USE_BEST the best.
        device: auto for a GPU if there is one.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    settings = resolve({}, "sample", with_environment=True)
    if run is None:
        folder = with_latest_run(settings).run_dir
    elif os.sep in str(run):
        folder = Path(run)
    else:
        folder = settings.general.data_dir / "runs" / run
    checkpoint = latest_checkpoint(folder, step, use_best=settings.train.use_best)
    # Imported after these checks, because torch takes seconds.
    from app.data.tokenizer import Tokenizer
    from app.hardware.device import select_device
    from app.inference.loaded import LoadedModel
    from app.runs.load import load_model

    selected = select_device(device, "float32", "false")
    return LoadedModel(load_model(checkpoint, selected), Tokenizer())


def _run_command(name: str, settings: Mapping[str, Setting]) -> Settings:
    """Run a command in a process of its own, print what it prints, and return its settings."""
    variables = {
        field: variable
        for group in COMMANDS[name].flags
        for variable, field in GROUPS[group].variables().items()
        if variable != "HF_TOKEN"  # others could read it from the list of processes
    }
    for field in settings.keys() - variables.keys():
        problem = f"{name} has no setting {field!r}{suggestion(field, variables)}"
        raise UserError(problem, f"`{program()} {name} --help` explains those that it has")
    flags = {
        variables[field]: ",".join(map(str, it)) if isinstance(it, list | tuple) else str(it)
        for field, it in settings.items()
        if it is not None
    }
    resolved = resolve(flags, name, with_environment=True)
    package = "gpt_compose" if is_installed() else "app"
    # -P: not what has this name in the current folder.
    command = [sys.executable, "-P", "-m", package, name]
    command += [f"{flag_name(variable)}={text}" for variable, text in flags.items()]
    code, error = _wait(command, str(Path(sys.modules[package].__file__ or "").parents[1]))
    if code == ExitCode.SIGINT:
        raise KeyboardInterrupt
    if code:
        problem, _, fix = error.partition("\n  fix: ")
        problem = problem or f"{name} ended with exit code {code}"
        raise _ERRORS.get(code, AppError)(problem, fix or "its output above says why")
    return resolved


def _wait(command: list[str], package_parent: str) -> tuple[int, str]:
    """Run a command line to its end, and print what it prints, but not its error.

    Args:
        package_parent: where the command's package is, if it is not installed.

    Returns:
        the exit code, and the error that it reports; empty if it reports none.
    """
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package_parent)))
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    error = ""
    received: list[int] = []

    def pass_on(number: int) -> None:
        # In a terminal the process has got one as well, and takes the two for one request.
        process.send_signal(number)
        received.append(number)

    # In other threads Python handles no signals.
    is_main = threading.current_thread() is threading.main_thread()
    with process.stdout as output, on_stop_signals(pass_on, pass_on) if is_main else nullcontext():
        for line in output:
            if line.startswith("error: "):
                error = line.removeprefix("error: ")
            elif error and line.startswith(" "):
                error += line
            else:
                # By this process: a notebook does not show what another one prints.
                print(line, end="", flush=True)
        code = process.wait()
    if received and not error:
        signal.raise_signal(received[0])
    return code, error.removesuffix("\n")
