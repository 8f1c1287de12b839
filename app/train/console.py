"""What a person sees while a run goes on: the original's lines, and a bar on a terminal."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_GIB = 1 << 30


class Console:
    """Prints a line a step, above a bar with the time left where there is a terminal.

    Args:
        quiet: print nothing: another process does.
    """

    def __init__(self, first_step: int, max_steps: int, *, quiet: bool = False) -> None:
        self._max_steps, self._quiet = max_steps, quiet
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            disable=True if quiet else None,
            dynamic_ncols=True,
        )

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if not self._quiet:
            with _whatever_becomes_of_the_screen():
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def step(self, record: Mapping[str, Any]) -> None:
        """Print a step's line and move the bar."""
        self.say(step_line(record, self._max_steps))
        with _whatever_becomes_of_the_screen():
            self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        with _whatever_becomes_of_the_screen():
            self._bar.close()


@contextmanager
def _whatever_becomes_of_the_screen() -> Iterator[None]:
    """A terminal that is lost or a log on a full disk does not end the training."""
    try:
        yield
    except BrokenPipeError:
        # Whoever reads the output has seen enough.
        raise
    except OSError:
        pass


def step_line(record: Mapping[str, Any], max_steps: int) -> str:
    """A step's line; it begins as the original program's did."""
    mfu = f" mfu:{record['mfu']:.1%}" if record["mfu"] is not None else ""
    return (
        f"step:{record['step']}/{max_steps} train_loss:{record['train_loss']:.4f} "
        f"train_time:{record['step_ms']:.0f}ms token/s:{record['tokens_per_second']:.2f} "
        f"lr:{record['lr']:.2e} grad_norm:{record['grad_norm']:.3f}{mfu} "
        f"memory:{record['memory_bytes'] / _GIB:.1f}GiB"
    )


def summary(seconds: float, tokens: int) -> str:
    """The original program's last three lines."""
    return (
        f"Total time: {seconds:.2f}s ({seconds / 60:.2f} minutes)\n"
        f"Total tokens processed: {tokens:,}\n"
        f"Average tokens/sec: {tokens / seconds:.2f}"
    )
