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
from app.signals import erase_echo, exit_now, print_in_handler
from app.streams import prepare_streams

if TYPE_CHECKING:
    from types import FrameType, TracebackType


def run(argv: Sequence[str]) -> int:
    """Run the command given by the arguments and return its exit code."""
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
    except (OSError, MemoryError, RuntimeError, ImportError, ValueError) as error:
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
    if message:
        print(f"{erase_echo()}{message}", file=sys.stderr, flush=True)
    _flush()
    return code


def run_as_process(
    run: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None
) -> NoReturn:
    """Pass arguments, by default this process's, to `run`, and exit with the code it returns."""
    prepare_streams()
    # Process 1 of a container ignores a signal unless it has a handler.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit_at_once)
    sys.excepthook = _die
    exit_code = run(sys.argv[1:] if argv is None else argv)
    # Everything is written. Threads that still wait for the network, a disk or another rank must
    # not delay the exit; nor must torch and CUDA, which free their memory piece by piece.
    os._exit(exit_code)


def raise_on_signals() -> None:
    """Make signals raise an exception from now on: the command has something to tidy up.

    Before that, imports might turn the exception into another one, or lose it.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, _terminate),
    ):
        if signal.getsignal(number) is _exit_at_once:
            signal.signal(number, handler)


def _exit_at_once(number: int, _frame: FrameType | None) -> None:
    print_in_handler("stopped" if number == signal.SIGINT else "stopped: by SIGTERM")
    exit_now(number)


def _flush() -> None:
    # The exit code is decided: output that is lost now does not change it.
    with suppress(Exception):
        sys.stdout.flush()


def _die(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a bug's traceback and exit at once.

    Otherwise Python waits for threads and other ranks, which may never end by themselves.
    """
    sys.__excepthook__(kind, error, trace)
    _flush()
    os._exit(ExitCode.BUG)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Stopped(ExitCode.SIGTERM, "by SIGTERM")
