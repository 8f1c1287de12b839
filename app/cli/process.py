"""A command as a process: its exit code, its signals, its standard output."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NoReturn

from app.errors import AppError, ExitCode, ExitWithCode, Stopped
from app.failures import translate_error

if TYPE_CHECKING:
    from types import FrameType, TracebackType


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the arguments name, by default this process's. The console script."""
    run_as_process(run, argv)


def run(argv: Sequence[str]) -> int:
    """Run the command given by the arguments and return its exit code."""
    # Imported late, so that Ctrl-C during the imports is handled, too.
    return run_and_report(lambda: resolve_name("app.cli.commands:run_command")(argv))


def run_and_report(command: Callable[[], object]) -> int:
    """Run a command, report an expected failure and return the exit code; let a bug pass."""
    code: int = ExitCode.DONE
    message = ""
    try:
        command()
        sys.stdout.flush()
    except AppError as error:
        code, message = error.exit_code, f"error: {error}"
    except SystemExit:
        # argparse has printed the help.
        pass
    except BrokenPipeError:
        # The reader of the output, head or less, has closed the pipe.
        code = ExitCode.SIGPIPE
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        expected = translate_error(error)
        if expected is None:
            raise
        code, message = expected.exit_code, f"error: {expected}"
    except Stopped as stopped:
        code, message = stopped.exit_code, f"stopped: {stopped}"
    except ExitWithCode as request:
        code = request.exit_code
    except KeyboardInterrupt:
        code, message = ExitCode.SIGINT, "stopped"
    # The terminal may be gone.
    with suppress(OSError):
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    _drop_unwritable_output()
    return code


def run_as_process(
    run: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None
) -> NoReturn:
    """Pass arguments, by default this process's, to `run`, and exit with the code it returns."""
    # Process 1 of a container ignores this signal unless it has a handler.
    signal.signal(signal.SIGTERM, _terminate)
    sys.excepthook = _die
    exit_code = run(sys.argv[1:] if argv is None else argv)
    # Everything is written. Threads that still wait for the network, a disk or another rank must
    # not delay the exit; nor must torch and CUDA, which free their memory piece by piece.
    os._exit(exit_code)


def _drop_unwritable_output() -> None:
    """Flush stdout, or redirect it so that the interpreter does not complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _die(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a bug's traceback and exit at once.

    Otherwise Python waits for threads and other ranks, which may never end by themselves.
    """
    sys.__excepthook__(kind, error, trace)
    _drop_unwritable_output()
    os._exit(ExitCode.BUG)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Stopped(ExitCode.SIGTERM, "by SIGTERM")
