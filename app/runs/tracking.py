"""A tracker of runs, Trackio or Weights & Biases, as a process that training never waits for."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from app.failures import translate_error
from app.runs.folder import RunFolder

_MOST_SECONDS_TO_FINISH = 30.0


class Tracker:
    """Keeps a tracker up to date with a run, from its first step on.

    The process reads metrics.jsonl by itself: it cannot slow training, misses nothing, and after a
    restart sends the run again from its first step. Any failure prints one warning.

    Args:
        kind: trackio or wandb.
        run: the run; its settings.json and metrics.jsonl exist.
        print_line: prints a warning.
    """

    def __init__(self, kind: str, run: RunFolder, print_line: Callable[[str], None]) -> None:
        self._kind, self._print_line = kind, print_line
        self._log = run.path / "tracker.log"
        self._process: subprocess.Popen[bytes] | None = None
        if missing := translate_error(ModuleNotFoundError(name=kind)):
            self._warn(f"{missing.problem}; {missing.fix}")
            return
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    # Finds modules where this process has found them, not in the current folder.
                    [sys.executable, "-P", "-m", "app.runs.send_to_tracker", kind, str(run.path)],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C is for training, which ends standard input once all is written.
                    start_new_session=True,
                )
        except OSError as error:
            self._warn(f"{kind} has not started: {error}")

    def check(self) -> None:
        """Print a warning if the process has died."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        self._process = None
        if code:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            said = []
            with suppress(OSError):
                said = self._log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            problem = ": ".join([f"{self._kind} has died ({how})", *said])[:300]
            self._warn(f"{problem} ({self._log})")

    def close(self) -> None:
        """Wait a limited time until the process has sent the last points."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        try:
            self._process.wait(_MOST_SECONDS_TO_FINISH)
        except subprocess.TimeoutExpired:
            # With the processes that it has started.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.check()

    def _warn(self, problem: str) -> None:
        self._print_line(f"warning: training continues without a tracker: {problem}")
