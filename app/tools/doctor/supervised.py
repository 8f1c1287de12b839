"""Trying out the device in another process, which may crash or hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import app
from app.tools.doctor.case import Case, Trial, existing
from app.tools.doctor.finding import Finding

LIMIT_SECONDS = 300.0
_NOT_COMPILED = "set TRAIN_COMPILE=false, which trains without the compiler, slower"


def check_device(case: Case, limit_seconds: float = LIMIT_SECONDS) -> Iterator[Finding]:
    """Everything that touches the device; tells `case` what it has shown of itself.

    What is compiled is not kept, so that every examination compiles; but it is put where train's
    is, since a file system may forbid to run what it holds.

    Args:
        case: the examination.
        limit_seconds: that one check may take.
    """
    settings = case.settings.public()
    place = existing(case.settings.general.data_dir / "cache")
    with ExitStack() as removed:
        variables = {}
        try:
            made = tempfile.TemporaryDirectory(
                dir=place, prefix=".doctor-", ignore_cleanup_errors=True
            )
        except OSError as error:
            # What is wrong with the place, other checks tell.
            settings["train"]["compile"] = "false"
            yield Finding("compile", "skip", f"not tried: {place} takes no file ({error.strerror})")
        else:
            code = Path(removed.enter_context(made))
            variables = {
                "TORCHINDUCTOR_CACHE_DIR": str(code / "inductor"),
                "TRITON_CACHE_DIR": str(code / "triton"),
            }
        for finding in _tried(case, settings, variables, limit_seconds):
            if variables or finding.check != "compile":
                yield finding


def _tried(
    case: Case, settings: dict[str, Any], variables: dict[str, str], limit_seconds: float
) -> Iterator[Finding]:
    check = "device"
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with (
            _child(settings, variables, errors) as process,
            _Alarm(process, limit_seconds) as alarm,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                alarm.set_again()
                answer = json.loads(line)
                check = answer.get("begins", check)
                if "finding" in answer:
                    yield Finding(**answer["finding"])
                if "trial" in answer:
                    case.trial = Trial(**answer["trial"])
            code = process.wait()
        if alarm.has_rung:
            fix = "restart the machine; if that does not help, take another"
            yield Finding(
                check,
                "fail",
                f"this has not ended after {limit_seconds:g} s",
                _NOT_COMPILED if check == "compile" else fix,
            )
        elif code:
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            yield Finding(
                check,
                "fail",
                ": ".join([f"the process that tried this has died ({how})", *last])[:400],
                "after SIGKILL, take a machine with more memory; else update the driver",
            )


@contextmanager
def _child(
    settings: dict[str, Any], variables: dict[str, str], errors: IO[str]
) -> Iterator[subprocess.Popen[str]]:
    """app.tools.doctor.trial; neither it nor what it starts outlives the block."""
    # Wherever this program was found, there it is.
    places = [str(Path(app.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as question:
        json.dump(settings, question)
        question.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "app.tools.doctor.trial"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **variables},
            stdin=question,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _Alarm:
    """Kills a process, and all that it has started, unless it is set again in time."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.has_rung = False
        self._process, self._seconds = process, seconds
        self._timer: threading.Timer | None = None

    def set_again(self) -> None:
        """Wait as long once more."""
        self._stop()
        self._timer = threading.Timer(self._seconds, self._ring)
        self._timer.daemon = True
        self._timer.start()

    def _ring(self) -> None:
        self.has_rung = True
        _kill(self._process)

    def _stop(self) -> None:
        if self._timer:
            self._timer.cancel()

    def __enter__(self) -> "_Alarm":
        self.set_again()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()
