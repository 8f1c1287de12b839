"""Tests pass whatever the shell of their caller has set."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.newcomer import REPOSITORY

# Each of them failed in some of these surroundings.
TESTS = (
    "tests/cli/test_commands.py::test_a_signal_before_the_command_starts_ends_the_program_cleanly",
    "tests/settings/test_sources.py::test_the_source_above_wins",
    "tests/test_locks.py::test_without_flock_the_message_names_the_process",
    "tests/test_signals.py",
    "tests/test_streams.py::test_every_character_can_be_printed",
    "tests/train/test_start.py",
)
SHELL = """
LC_ALL=POSIX TERM=dumb COLUMNS=20 NO_COLOR=1 TZ=Asia/Kathmandu CDPATH=/ BASH_ENV=/nowhere
PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=latin-1 PYTHONOPTIMIZE=1 PYTHONSAFEPATH=1
RECIPE=nowhere TRAIN_SEED=9 DATA_DIR=/nowhere HF_HUB_OFFLINE=1 IN_CONTAINER=1 GIT_DIR=/nowhere
TORCHELASTIC_RUN_ID=any OMP_NUM_THREADS=64 CXX=/nowhere
"""


def beset() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.umask(0o777)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for descriptor in range(3, 20):
        os.dup2(0, descriptor)
    os.close(0)


@pytest.mark.slow
def test_tests_depend_on_nothing_that_the_shell_has_set(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-n1", "-p", "no:cacheprovider", *TESTS],
        cwd=REPOSITORY,
        env=dict(line.split("=") for line in SHELL.split())
        | {"PATH": os.environ["PATH"], "TMPDIR": str(folder)},
        preexec_fn=beset,
        close_fds=False,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
