"""The process that checks the device, so that a crash or a hang there does not end `doctor`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from tempfile import TemporaryFile

from app.errors import AppError
from app.failures import check_torch_version
from app.settings.settings import Settings
from app.tools.doctor.checks import (
    REPORT_IT,
    WITHOUT_COMPILER,
    Context,
    DeviceReport,
    Finding,
    existing,
    failure,
    run_check,
)
from app.train.command import keep_bytecode

# Checks of the device, in their order -> the most seconds between two messages. The first limit
# includes the import of torch.
LIMITS = {
    "device": 120.0,
    "precision": 30.0,
    "memory": 60.0,
    "shared memory": 30.0,
    "attention": 60.0,
    "matmul": 60.0,
    "copies": 60.0,
    "compile": 180.0,
}
_ANOTHER_MACHINE = "restart the machine; if that does not help, take another"


def device_findings(context: Context, limits: Mapping[str, float] = LIMITS) -> Iterator[Finding]:
    """Check the device in a new process, yield the findings, and keep the report in `context`.

    Neither the process nor what it starts outlives the iterator, which must be closed.

    Raises:
        ModuleNotFoundError: torch is not installed.
        UserError: torch is too old.
        OSError: the process cannot be started.
    """
    if find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    check_torch_version()
    settings = context.settings
    cache_dir = settings.general.data_dir / "cache"
    if settings.train.compile and os.access(settings.general.data_dir, os.W_OK):
        keep_bytecode(cache_dir)
    pipe, remote = Pipe()
    names = list(limits)
    check = names[0]
    with TemporaryFile("w+", errors="replace") as output, pipe:
        # Once it is closed here, the pipe ends with the process.
        with remote:
            process = subprocess.Popen(
                # Finds modules where this process has found them, not in the current folder (-P).
                [sys.executable, "-P", "-m", "app.tools.doctor.child", str(remote.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(remote.fileno(),),
                start_new_session=True,
            )
        try:
            pipe.send(settings)
            while pipe.poll(limits[check]):
                match pipe.recv():
                    case DeviceReport() as report:
                        context.report = report
                    case Finding() as finding:
                        yield finding
                    case None:
                        return
                    case name:
                        check = name
            fix = WITHOUT_COMPILER if check == "compile" else _ANOTHER_MACHINE
            yield Finding(check, "fail", f"this has not ended after {limits[check]:g} s", fix)
        except (EOFError, OSError):
            code = process.wait()
            output.seek(0)
            yield _death(check, code, output.read())
        finally:
            # The compilers that it has started are in its group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for name in names[names.index(check) + 1 :]:
        yield Finding(name, "skip", f"not tried, because of {check}")


def _death(check: str, code: int, output: str) -> Finding:
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    last = [line for line in output.splitlines() if line.strip()][-1:]
    found = ": ".join([f"the process that tried this has died ({how})", *last])[:400]
    fix = "after SIGKILL, take a machine with more memory; else update the driver"
    return Finding(check, "fail", found, fix)


def check_device(pipe: Connection) -> None:
    """Check the device, as the new process.

    Args:
        pipe: gives the settings; takes the name of each check, its findings and the report; at the
            end None, because the process takes its time to exit.
    """
    settings: Settings = pipe.recv()
    cache_dir = settings.general.data_dir / "cache"
    try:
        with TemporaryFile(dir=existing(cache_dir)):
            can_cache = True
    except OSError:
        can_cache = False
        # The image sets folders in /data, where torch would fail before it compiles anything.
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        os.environ.pop("TRITON_CACHE_DIR", None)
    # Both import torch, which the parent process does not need.
    from app.tools.doctor.device import DeviceChecks
    from app.train.compile import set_compile_cache_dir

    if can_cache:
        set_compile_cache_dir(cache_dir)
    try:
        device = DeviceChecks(settings, can_cache=can_cache)
    except (AppError, RuntimeError) as error:
        pipe.send(failure("device", error))
        pipe.send(None)
        return
    for name in LIMITS:
        pipe.send(name)
        check = getattr(device, f"check_{name.replace(' ', '_')}")
        for finding in run_check(name, check, WITHOUT_COMPILER if name == "compile" else REPORT_IT):
            pipe.send(finding)
        pipe.send(device.report)
    pipe.send(None)


if __name__ == "__main__":
    check_device(Connection(int(sys.argv[1])))
