"""The context of the checks of `doctor`, and their findings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Literal

from app.errors import AppError, ExitWithCode, Stopped
from app.failures import translate_error
from app.settings.settings import Settings
from app.train.advice import HELLASWAG_QUESTIONS

Status = Literal["pass", "warn", "fail", "skip"]

# A weight and at most two moments of it, in float32.
CHECKPOINT_BYTES_PER_PARAMETER = 12
WITHOUT_COMPILER = "set TRAIN_COMPILE=false, which trains without the compiler, slower"
REPORT_IT = "this is unexpected: please report it"


@dataclass
class DeviceReport:
    """The measurements of a device.

    Attributes:
        device_type: cpu, cuda or mps
        processes: number of processes that train on this machine, each on such a device
        matmul_flops: rate of a large matrix product, FLOP/s
        model_flops_per_token: the configured model's FLOPs per token, forward and backward
        micro_batch_tokens: tokens in one forward and backward pass; 0 if there was none
        micro_batch_seconds: duration of such a pass
        optimizer_seconds: duration of an update
        compile_seconds: time until the first pass had ended; 0 if uncompiled
    """

    device_type: str
    processes: int
    matmul_flops: float = 0.0
    model_flops_per_token: float = 0.0
    micro_batch_tokens: int = 0
    micro_batch_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    compile_seconds: float = 0.0


@dataclass
class Context:
    """The run to check, and what its checks have learned so far.

    Attributes:
        settings: the run's settings
        verify: compare every hash of the dataset
        disk_bytes: disk space that the run still needs; None if unknown
        planned_steps: number of steps that the run's time limit has planned, if it has
        download_bytes: of the model to begin with, if it is not here yet
        steps_completed: steps that the run has completed so far
        elapsed_seconds: time that they have taken
        fingerprint: the dataset's fingerprint; None unless it is complete and undamaged
        train_tokens, val_tokens: training and held-out tokens of the dataset; None unless it is
            complete
        questions: HellaSwag's questions to answer each time; the published ones unless counted
        report: measurements of the device; None before there are any
    """

    settings: Settings
    verify: bool = False
    disk_bytes: int | None = None
    planned_steps: int | None = None
    download_bytes: int = 0
    steps_completed: int = 0
    elapsed_seconds: float = 0.0
    fingerprint: str | None = None
    train_tokens: int | None = None
    val_tokens: int | None = None
    questions: int = HELLASWAG_QUESTIONS
    report: DeviceReport | None = None

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return self.planned_steps or self.settings.train.max_steps

    @property
    def remaining_steps(self) -> int:
        """Return the steps that the run still has to do."""
        return max(0, self.steps - self.steps_completed)


@dataclass(frozen=True)
class Finding:
    """A row of the table: `found` is how things are, `fix` is what to do about it."""

    check: str
    status: Status
    found: str
    fix: str = ""


def graded(check: str, found: str, *grades: tuple[Status, object, str]) -> Finding:
    """Return a finding for the first grade whose condition holds, or a pass if none does.

    A grade is (status, condition, fix).
    """
    status, fix = next(((status, fix) for status, applies, fix in grades if applies), ("pass", ""))
    return Finding(check, status, found, fix)


def failure(check: str, error: Exception, fix: str = REPORT_IT) -> Finding:
    """Return the finding of a check that raised an error; `fix` is for errors without their own."""
    expected = error if isinstance(error, AppError) else translate_error(error)
    if expected is not None:
        return Finding(check, "fail", expected.problem, expected.fix)
    message = " ".join(str(error).split())[:300]
    return Finding(check, "fail", f"{type(error).__name__}: {message}", fix)


def run_check(
    check: str, find: Callable[[], Iterable[Finding]], fix: str = REPORT_IT
) -> Iterator[Finding]:
    """Yield the findings of a check; an error in it becomes its last finding, see `failure`."""
    try:
        yield from find()
    except Exception as error:
        if isinstance(error, Stopped | ExitWithCode):
            raise
        yield failure(check, error, fix)


def run_check_within(
    seconds: float | None, check: str, find: Callable[[], Iterable[Finding]]
) -> list[Finding]:
    """Return the findings of a check; one that hangs (a disk, a network) is left in its thread."""
    findings: list[Finding] = []
    thread = Thread(target=findings.extend, args=(run_check(check, find),), daemon=True)
    thread.start()
    thread.join(seconds)
    if not thread.is_alive():
        return findings
    fix = "see which disk, network or driver does not answer; if it stays, take another machine"
    return [*findings, Finding(check, "fail", f"this has not ended after {seconds:g} s", fix)]


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists, where it would be created."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
