"""The processes of a sweep: one `train` for each run, one at a time on each device."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from app.containers import SWEEP, python_command
from app.distributed.launch import processes_to_launch
from app.errors import ExitCode
from app.progress import print_line
from app.settings.settings import Settings
from app.settings.sources import flag_name
from app.signals import exit_code_of, on_stop_signals
from app.tools.sweep.plan import PlannedRun

# The GPU of a run; None leaves the choice to the run.
Device = str | None


def devices(settings: Settings) -> list[Device]:
    """Return where runs train side by side: on each GPU, unless TRAIN_PROCESSES is set."""
    count = 1
    if settings.train.processes == "auto":
        count = processes_to_launch("auto", settings.train.device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(count)]
    return [*gpus[:count]] if count > 1 else [None]


def train_all(
    runs: Sequence[PlannedRun],
    planned: int,
    places: Sequence[Device],
    logs: Path,
    ended: Callable[[PlannedRun, int], None],
) -> int:
    """Train runs, each in a process of its own.

    A signal is passed on to the processes, which save. After it, or after a failure, no run begins.

    Args:
        runs: those that are not complete, of the `planned` ones.
        places: a device for each of the runs that train at the same time.
        logs: folder of their output, if there are several devices.
        ended: called with a run that is complete or has diverged, and its exit code.

    Returns:
        the exit code: 0, that of the signal, or that of the first run that failed.
    """
    waiting, free = deque(runs), deque(places)
    running: dict[int, tuple[subprocess.Popen[bytes], PlannedRun, Device]] = {}
    exit_code = 0

    def send(number: int) -> None:
        for pid in list(running):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(number: int) -> None:
        nonlocal exit_code
        exit_code = exit_code or exit_code_of(number)
        send(number)

    with on_stop_signals(stop, stop), ExitStack() as stack:
        stack.callback(send, signal.SIGTERM)
        while running or (waiting and not exit_code):
            while waiting and free and not exit_code:
                run, device = waiting.popleft(), free.popleft()
                log = logs / f"{run.name}.log" if len(places) > 1 else None
                where = f" on GPU {device}; it prints to {log}" if log else ""
                print_line(f"\nrun {planned - len(waiting)} of {planned}: {run.name}{where}")
                process = _start(run, device, log)
                running[process.pid] = process, run, device
                if exit_code:
                    # The signal came before the process was known.
                    send(signal.SIGTERM)
            pid, status = os.wait()
            # As PID 1, or after a shell's `exec`, this process has children that are no runs.
            if pid not in running:
                continue
            process, run, device = running.pop(pid)
            free.append(device)
            code = process.returncode = os.waitstatus_to_exitcode(status)
            if code in (ExitCode.DONE, ExitCode.NOT_FINITE):
                ended(run, code)
            elif not exit_code:
                exit_code = 128 - code if code < 0 else code
                print(
                    f"error: the run {run.name} has failed with exit code {exit_code}\n"
                    "  fix: mend what it reports above or in its log; then the same command "
                    "continues the sweep",
                    file=sys.stderr,
                    flush=True,
                )
                send(signal.SIGTERM)
    return exit_code


def _start(run: PlannedRun, device: Device, log: Path | None) -> subprocess.Popen[bytes]:
    flags = [f"{flag_name(name)}={text}" for name, text in run.flags.items()]
    environment = {SWEEP: "1", **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}
    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log else None
        return subprocess.Popen(
            [*python_command(), "train", *flags],
            env=os.environ | environment,
            stdout=output,
            stderr=output and subprocess.STDOUT,
        )
