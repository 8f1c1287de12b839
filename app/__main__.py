"""The command line: one function per command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app.errors import AppError, ExitCode, Stopped, from_os_error
from app.settings import Settings
from app.sources import Parser, add_flags, load_settings, refuse_unknown, with_dashes


def prepare(settings: Settings, arguments: argparse.Namespace) -> None:
    """Turn text into checked token shards."""
    from app.data.prepare import prepare

    chosen = settings.prepare
    token = settings.general.hf_token
    prepare(
        chosen.dataset,
        settings.prepare_dir,
        name=chosen.dataset_name,
        config=chosen.config,
        revision=chosen.dataset_revision,
        split=chosen.split,
        text_column=chosen.text_column,
        shuffle_files=chosen.shuffle_files,
        total_tokens=None if chosen.total_tokens == "all" else chosen.total_tokens,
        val_tokens=chosen.val_tokens,
        shard_size=chosen.shard_size,
        workers=(os.cpu_count() or 1) if chosen.workers == "auto" else chosen.workers,
        hf_token=token.get_secret_value() if token else None,
    )


def train(settings: Settings, arguments: argparse.Namespace) -> None:
    """Train a GPT on the shards; continue the run if it exists."""
    from app.train.job import train

    train(settings)


def sample(settings: Settings, arguments: argparse.Namespace) -> None:
    """Let a trained model write."""
    from app.tools.sample import sample

    sample(settings)


def evaluate(settings: Settings, arguments: argparse.Namespace) -> None:
    """Measure a trained model's loss on held-out text."""
    from app.tools.evaluate import evaluate

    evaluate(settings)


def inspect(settings: Settings, arguments: argparse.Namespace) -> None:
    """Describe and verify a shard, a dataset folder, a checkpoint or a run."""
    from app.tools.inspect import inspect

    path = Path(arguments.path)
    place = path if path.exists() else settings.general.data_dir / path
    for line in inspect(place, verify=arguments.verify):
        print(line, flush=True)


def report(settings: Settings, arguments: argparse.Namespace) -> None:
    """Draw loss, learning rate, gradient norm and throughput of a run."""
    from app.tools.report import write_report

    print(write_report(settings.run_dir))


@dataclass(frozen=True)
class Command:
    """A command, the settings it has flags for, and what it takes besides."""

    run: Callable[[Settings, argparse.Namespace], None]
    flags: tuple[str, ...]
    takes_path: bool = False


COMMANDS = {
    "prepare": Command(prepare, ("prepare", "general")),
    "train": Command(train, ("train", "model", "general")),
    "sample": Command(sample, ("sample", "train.run_name", "train.device", "general")),
    "evaluate": Command(evaluate, ("evaluate", "train.run_name", "train.device", "general")),
    "inspect": Command(inspect, ("general",), takes_path=True),
    "report": Command(report, ("train.run_name", "general")),
}

_EPILOG = """\
Every setting is a flag, an environment variable, a line of .env or of a recipe; the first of
these that has it wins. .env.example lists them all. The order of work:

  RECIPE=demo python -m app prepare     text -> shards
  RECIPE=demo python -m app train       shards -> a trained GPT
  RECIPE=demo python -m app sample      what it writes
  RECIPE=demo python -m app report      how it learned, as a picture
"""


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m app",
        description="From raw web text to a trained GPT-2.",
        epilog=_EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=100),
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        words = (command.run.__doc__ or "").strip()
        one = commands.add_parser(
            name,
            help=words,
            description=words,
            formatter_class=partial(argparse.HelpFormatter, width=100, max_help_position=34),
            allow_abbrev=False,
        )
        if command.takes_path:
            one.add_argument("path", help="as it is, or below DATA_DIR")
            one.add_argument("--verify", action="store_true", help="compare every hash as well")
        add_flags(one, command.flags)
    parsed, unknown = parser.parse_known_args(with_dashes(arguments))
    refuse_unknown(commands.choices[parsed.command], unknown)
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an unexpected exception passes through."""
    try:
        parsed = _parse(arguments)
        flags = {name: value for name, value in vars(parsed).items() if name.isupper() and value}
        COMMANDS[parsed.command].run(load_settings(flags, parsed.command), parsed)
    except AppError as error:
        return _fail(error)
    except OSError as error:
        expected = from_os_error(error)
        if expected is None:
            raise
        return _fail(expected)
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return ExitCode.SIGINT
    return ExitCode.DONE


def _fail(error: AppError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
