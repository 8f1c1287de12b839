"""Trying out the device in another process, which may crash or hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from typing import Self

from app.tools.doctor.case import Case, Trial, existing
from app.tools.doctor.finding import UNCOMPILED, Finding
from app.train.start import keep_bytecode

# Seconds that each check of the device may go on without a word, in their order. The first waits
# for torch as well.
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


class DeviceProcess:
    """The process of app.tools.doctor.trial: it imports torch at once, and waits.

    As a context manager: neither it nor what it starts outlives the block.

    Args:
        case: the examination.
        limits: check -> seconds.
    """

    def __init__(self, case: Case, limits: Mapping[str, float] = LIMITS) -> None:
        self._case, self._limits = case, limits
        self._cache = existing(case.settings.general.data_dir / "cache")
        self._can_keep_code = _takes_files(self._cache)
        self._ending = ExitStack()
        self._failure: OSError | None = None

    def __enter__(self) -> Self:
        try:
            self._errors = self._ending.enter_context(
                tempfile.TemporaryFile("w+", errors="replace")
            )
            self._start()
        except OSError as error:
            self._failure = error
        return self

    def _start(self) -> None:
        settings = self._case.settings.public()
        settings["train"]["compile"] &= self._can_keep_code
        if settings["train"]["compile"]:
            keep_bytecode(self._case.settings.general.data_dir / "cache")
        self._pipe, theirs = Pipe()
        self._ending.enter_context(self._pipe)
        descriptor = theirs.fileno()
        # Where this program was found, its parts are.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        if not self._can_keep_code:
            # The image's, below /data: torch would fail there before it compiles anything.
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
                environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app.tools.doctor.trial", f"{descriptor}", json.dumps(settings)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(descriptor,),
            start_new_session=True,
        )
        self._ending.enter_context(self._process)
        self._ending.callback(self._kill)
        # Its end is then the end of what can be read.
        theirs.close()

    def __exit__(self, *_error: object) -> None:
        self._ending.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def findings(self) -> Iterator[Finding]:
        """Yield the findings of the device's checks, and keep what they measured in `case`."""
        if self._failure:
            raise self._failure
        if find_spec("torch") is None:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        check, *left = self._limits
        with suppress(OSError):
            self._pipe.send("begin")
        try:
            while self._pipe.poll(self._limits[check]):
                answer = self._pipe.recv()
                if isinstance(answer, Trial):
                    self._case.trial = answer
                elif isinstance(answer, Finding):
                    yield self._told(answer)
                elif answer in left:
                    check = answer
                    left.remove(check)
                elif answer is None:
                    return
        except (EOFError, ConnectionResetError):
            yield self._died(check, self._process.wait())
        else:
            fix = "restart the machine; if that does not help, take another"
            said = f"this has not ended after {self._limits[check]:g} s"
            yield Finding(check, "fail", said, UNCOMPILED if check == "compile" else fix)
        for name in left:
            yield Finding(name, "skip", f"not tried, because of {check}")

    def _told(self, finding: Finding) -> Finding:
        if finding.check == "compile" and not self._can_keep_code:
            return replace(finding, found=f"not tried: {self._cache} takes no file")
        return finding

    def _died(self, check: str, code: int) -> Finding:
        self._errors.seek(0)
        last = [line for line in self._errors.read().splitlines() if line.strip()][-1:]
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        said = ": ".join([f"the process that tried this has died ({how})", *last])[:400]
        fix = "after SIGKILL, take a machine with more memory; else update the driver"
        return Finding(check, "fail", said, fix)


def _takes_files(folder: Path) -> bool:
    """Return whether a file can be made there; what is wrong otherwise, another check tells."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
