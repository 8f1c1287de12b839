import os
from collections.abc import Callable

import pytest

Say = Callable[[str], None]

# Several tests, and the processes they start, share the cores: threads that wait for each other
# would take them all. And who runs tests side by side sets the width of a screen.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)


@pytest.fixture
def say(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line whatever pytest captures."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name}: {line}", flush=True)

    return show
