"""Trying out the device in another process, which may crash or hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from app.tools.doctor.case import Case, Trial, existing
from app.tools.doctor.finding import UNCOMPILED, Finding

LIMIT_SECONDS = 300.0


def check_device(case: Case, limit_seconds: float = LIMIT_SECONDS) -> Iterator[Finding]:
    """Everything that touches the device; tells `case` what it has shown of itself.

    What is compiled is not kept, so that every examination compiles; but it is put where train's
    is, since a file system may forbid to run what it holds.

    Args:
        case: the examination.
        limit_seconds: that one check may take.
    """
    settings = case.settings.public()
    variables = {}
    place = existing(case.settings.general.data_dir / "cache")
    with ExitStack() as removed:
        try:
            folder = tempfile.TemporaryDirectory(
                dir=place, prefix=".doctor-", ignore_cleanup_errors=True
            )
        except OSError:
            # What is wrong with the place, other checks tell.
            settings["train"]["compile"] = "false"
        else:
            code = removed.enter_context(folder)
            variables["TORCHINDUCTOR_CACHE_DIR"] = f"{code}/inductor"
            variables["TRITON_CACHE_DIR"] = f"{code}/triton"
        for finding in _tried(case, settings, variables, limit_seconds):
            if finding.check == "compile" and not variables:
                yield replace(finding, found=f"not tried: {place} takes no file")
            else:
                yield finding


def _tried(
    case: Case, settings: dict[str, Any], variables: dict[str, str], limit_seconds: float
) -> Iterator[Finding]:
    check = "device"
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        _child(settings, variables, errors) as (process, answers),
    ):
        try:
            while answers.poll(limit_seconds):
                answer = answers.recv()
                if isinstance(answer, Finding):
                    yield answer
                elif isinstance(answer, Trial):
                    case.trial = answer
                else:
                    check = answer
        except EOFError:
            code = process.wait()
        else:
            fix = "restart the machine; if that does not help, take another"
            said = f"this has not ended after {limit_seconds:g} s"
            yield Finding(check, "fail", said, UNCOMPILED if check == "compile" else fix)
            return
        if code:
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            said = ": ".join([f"the process that tried this has died ({how})", *last])[:400]
            fix = "after SIGKILL, take a machine with more memory; else update the driver"
            yield Finding(check, "fail", said, fix)


@contextmanager
def _child(
    settings: dict[str, Any], variables: dict[str, str], errors: IO[str]
) -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    """app.tools.doctor.trial; neither it nor what it starts outlives the block."""
    answers, pipe = Pipe(duplex=False)
    descriptor = pipe.fileno()
    with (
        answers,
        subprocess.Popen(
            [sys.executable, "-m", "app.tools.doctor.trial", f"{descriptor}", json.dumps(settings)],
            # Where this program was found, its parts are.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=(descriptor,),
            start_new_session=True,
        ) as process,
    ):
        # Its end is then the end of what can be read.
        pipe.close()
        try:
            yield process, answers
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
