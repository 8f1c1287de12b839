"""The command line: one function per command."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app.containers import program
from app.errors import AppError, ExitCode, ExitWithCode, Stopped, UserError
from app.failures import translate_error

if TYPE_CHECKING:
    from argparse import Namespace
    from types import FrameType, TracebackType

    from app.cli.parser import Parser
    from app.prepare.sources import TextSource
    from app.settings.prepare import PrepareSettings
    from app.settings.settings import Settings


def prepare(settings: Settings, arguments: Namespace) -> None:
    """Turn text into checked token shards."""
    # Imported modules are never garbage; looking for some among them takes 30 ms of a start.
    gc.set_threshold(100_000)
    from app.prepare.pipeline import prepare

    chosen = settings.prepare
    token = settings.general.hf_token
    prepare(
        text_source(chosen),
        settings.prepare_dir,
        name=chosen.dataset_name,
        total_tokens=None if chosen.total_tokens == "all" else chosen.total_tokens,
        val_tokens=chosen.val_tokens,
        shard_size=chosen.shard_size,
        workers=(os.cpu_count() or 1) if chosen.workers == "auto" else chosen.workers,
        hf_token=token.get_secret_value() if token else None,
    )


def text_source(chosen: PrepareSettings) -> TextSource:
    """Where the settings say that text comes from."""
    from app.prepare.sources import TextSource

    return TextSource(
        chosen.dataset,
        chosen.config,
        chosen.dataset_revision,
        chosen.split,
        chosen.text_column,
        chosen.shuffle_files,
        chosen.retry_seconds,
    )


def train(settings: Settings, arguments: Namespace) -> None:
    """Train a GPT on the shards; continue the run if it exists."""
    from app.train.start import start_training

    start_training(settings, arguments.words)


def sample(settings: Settings, arguments: Namespace) -> None:
    """Print text that a trained model writes."""
    from app.tools.sample import sample

    sample(settings)


def playground(settings: Settings, arguments: Namespace) -> None:
    """Serve a page on this machine on which to try a trained model."""
    from app.tools.playground.server import playground

    playground(settings)


def evaluate(settings: Settings, arguments: Namespace) -> None:
    """Measure a trained model's loss on held-out text."""
    from app.tools.evaluate import evaluate

    evaluate(settings)


def inspect(settings: Settings, arguments: Namespace) -> None:
    """Describe and verify a shard, a dataset folder, a checkpoint or a run."""
    from app.tools.inspect import inspect

    path, data_dir = Path(arguments.path), settings.general.data_dir
    place = next((place for place in (path, data_dir / path) if place.exists()), None)
    if place is None:
        raise UserError(
            f"there is no {path}, neither here nor in {data_dir}",
            "name a .bin file, or a folder that prepare or train has written",
        )
    for line in inspect(place, verify=arguments.verify):
        print(line, flush=True)


def report(settings: Settings, arguments: Namespace) -> None:
    """Make a page and pictures of how one or several runs have learned."""
    from app.tools.report.report import write_report

    folder = settings.general.data_dir / "runs"
    page, picture, *_ = write_report(
        [folder / name for name in arguments.runs] or [settings.run_dir]
    )
    print(page, picture, sep="\n")


def export(settings: Settings, arguments: Namespace) -> None:
    """Write a trained model as a folder that transformers and its kin load."""
    from app.tools.export.export import export

    export(settings)


def doctor(settings: Settings, arguments: Namespace) -> None:
    """Check the machine, and estimate the run, before it costs money."""
    from app.tools.doctor.examination import doctor

    doctor(settings, verify=arguments.verify, as_json=arguments.json)


@dataclass(frozen=True)
class Command:
    """A command, the settings it has flags for, and what it takes besides.

    Attributes:
        arguments: name -> what argparse's add_argument is told
    """

    run: Callable[[Settings, Namespace], None]
    flags: tuple[str, ...]
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def usage(self) -> str:
        """Return the usage of the arguments that are no flags."""
        words = [one for one in self.arguments.values() if "metavar" in one]
        return "".join(
            f"[{w['metavar']} ...] " if "nargs" in w else f"{w['metavar']} " for w in words
        )


_PATH = {"metavar": "PATH", "help": "as it is, or below DATA_DIR"}
_RUNS = {
    "metavar": "RUN",
    "nargs": "*",
    "help": "below DATA_DIR/runs; by default TRAIN_RUN_NAME",
}
_VERIFY = {"action": "store_true", "help": "compare every hash as well"}
_JSON = {"action": "store_true", "help": "print one JSON object instead of a table"}

COMMANDS = {
    "prepare": Command(prepare, ("prepare", "general")),
    "train": Command(train, ("train", "model", "general")),
    "sample": Command(sample, ("sample", "train.run_name", "train.device", "general")),
    "playground": Command(playground, ("playground", "train.run_name", "train.device", "general")),
    "evaluate": Command(
        evaluate,
        ("evaluate", "train.run_name", "train.dataset_dir", "train.device", "general"),
    ),
    "inspect": Command(inspect, ("general",), {"path": _PATH, "--verify": _VERIFY}),
    "doctor": Command(
        doctor, ("train", "model", "general"), {"--verify": _VERIFY, "--json": _JSON}
    ),
    "report": Command(report, ("train.run_name", "general"), {"runs": _RUNS}),
    "export": Command(export, ("export", "train.run_name", "train.dataset_dir", "general")),
}

_EPILOG = """\
Every setting is a flag, an environment variable, a line of .env or of a recipe;
the first of these that has it wins. .env.example lists them all.

The order of work:
  RECIPE=demo {program} doctor      what is missing, how long it takes
  RECIPE=demo {program} prepare     text -> shards
  RECIPE=demo {program} train       shards -> a trained GPT
  RECIPE=demo {program} sample      what it writes
  RECIPE=demo {program} report      how it learned, as a page and pictures
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an unexpected exception passes through."""
    return code_of(lambda: _run(arguments))


def code_of(command: Callable[[], int]) -> int:
    """Run a command, tell what an expected failure means, and return the exit code."""
    code: int
    try:
        code = command()
        sys.stdout.flush()
    except AppError as error:
        code = _fail(error)
    except SystemExit:
        # argparse has shown the help that was asked for.
        code = ExitCode.DONE
    except BrokenPipeError:
        # Whoever read the output, head or less, has seen enough.
        code = ExitCode.SIGPIPE
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        expected = translate_error(error)
        if expected is None:
            raise
        code = _fail(expected)
    except Stopped as stopped:
        _tell(f"stopped: {stopped}")
        code = stopped.exit_code
    except ExitWithCode as ended:
        code = ended.exit_code
    except KeyboardInterrupt:
        _tell("stopped")
        code = ExitCode.SIGINT
    _let_go_of_stdout()
    return code


def _run(arguments: Sequence[str]) -> ExitCode:
    # Imported here, so that Ctrl-C ends the program in order while it starts, too.
    from app.cli.parser import with_dashes
    from app.settings.sources import load_settings, suggestion

    parser, commands = _parsers()
    if not arguments:
        parser.print_help(sys.stderr)
        return ExitCode.USER
    if arguments[0] not in (*COMMANDS, "-h", "--help"):
        hint = suggestion(arguments[0], COMMANDS)
        parser.error(f"the first word is a command, and {arguments[0]!r} is none{hint}")
    parsed, unknown = parser.parse_known_args(with_dashes(arguments))
    commands[parsed.command].refuse(unknown)
    flags = {
        name: text for name, text in vars(parsed).items() if name.isupper() and text is not None
    }
    parsed.words = arguments
    COMMANDS[parsed.command].run(load_settings(flags, parsed.command), parsed)
    return ExitCode.DONE


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    from app.cli.parser import Parser

    parser = Parser(
        prog=program(),
        description="From raw web text to a trained GPT-2.",
        epilog=_EPILOG.format(program=program()),
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        words = (command.run.__doc__ or "").strip()
        usage = f"{program()} {name} {command.usage}[--SETTING VALUE ...]"
        one = commands.add_parser(name, help=words, description=words, usage=usage)
        for argument, told in command.arguments.items():
            one.add_argument(argument, **told)
        one.add_settings(command.flags)
    return parser, commands.choices


def _fail(error: AppError) -> ExitCode:
    _tell(f"error: {error}")
    return error.exit_code


def _tell(line: str) -> None:
    """Say it, if the terminal is still there."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _let_go_of_stdout() -> None:
    """Drop what can no longer be written; the interpreter would complain about it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _die(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a bug, and end at once: threads and other ranks may never do so."""
    sys.__excepthook__(kind, error, trace)
    _let_go_of_stdout()
    os._exit(ExitCode.BUG)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Stopped(ExitCode.SIGTERM, "by SIGTERM")


def run_as_process(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command line as this process, and end with its exit code."""
    # As process 1 of a container, the program would otherwise not notice this signal at all.
    signal.signal(signal.SIGTERM, _terminate)
    sys.excepthook = _die
    exit_code = main(sys.argv[1:])
    # All is done. Who still waits for the network, a disk or another rank does not keep the
    # process, nor does it free, piece by piece, what torch and CUDA have.
    os._exit(exit_code)


if __name__ == "__main__":
    run_as_process(main)
