import os
import signal
from collections.abc import Callable

import pytest

Say = Callable[[str], None]

# Several tests, and the processes they start, share the cores: threads that wait for each other
# would take them all. And who runs tests side by side sets the width of a screen.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)
# A shell starts what is in the background without it, and every process would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def say(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line whatever pytest captures."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name}: {line}", flush=True)

    return show
