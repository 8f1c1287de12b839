"""Tests depend on nothing that the shell of their caller has set."""

import atexit
import locale
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

Say = Callable[[str], None]
CHECKOUT = Path(__file__).parent.parent

# How programs, temporary folders, other machines and the container engine are found.
_KEPT = re.compile(
    r"PATH|HOME|LD_\w+|USER|(RAY_)?TMPDIR|\w+_PROXY|SSL_\w+|\w+_CA_BUNDLE|BASE_IMAGE|TORCH(_INDEX)?"
    r"|(BUILD|COMPOSE|DOCKER|HYPOTHESIS|PIP|PYTEST|UV)\w*_\w+",
    re.IGNORECASE,
)
# Python itself ignores these, and not in processes that it starts.
_IGNORED = {signal.SIGPIPE, signal.SIGXFSZ}
_OPEN_FILES = 1024


def _forget_the_shell() -> None:
    """Give this process, and those that it starts, the same surroundings everywhere."""
    os.umask(0o022)
    for name in os.environ:
        # Neither LD_PRELOAD nor torch.compile takes such a path.
        unusable = name == "TMPDIR" and re.search(r"[\s:'\"\\]", os.environ[name])
        if unusable or not _KEPT.fullmatch(name):
            del os.environ[name]
    tempfile.tempdir = None
    if not os.access(os.environ.get("HOME", ""), os.W_OK):
        os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")
        atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    # Several tests, and the processes they start, share the cores: threads that wait for each
    # other would take them all.
    os.environ |= {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    # Triton reads it once, when the first of a process's tests imports it.
    os.environ["TRITON_INTERPRET"] = "1"
    locale.setlocale(locale.LC_ALL, "")
    time.tzset()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, most), most))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - _IGNORED:
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


_forget_the_shell()
# On a machine that does much else any example may take seconds.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture
def say(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line whatever pytest captures."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name}: {line}", flush=True)

    return show
