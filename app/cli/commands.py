"""The commands: for each one its function, and the flags and arguments that it takes.

The functions are named, not imported: only the command that runs is imported, after its settings
have been checked.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from app.cli.parser import Parser
from app.containers import program
from app.errors import ExitCode, ExitWithCode
from app.settings.sources import load_settings, suggestion


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        function: `module:name`; called with the settings, and with each of `arguments` by name
        description: printed by the help
        flags: the settings that are flags; see app.cli.parser.Parser.add_settings
        arguments: further arguments -> keyword arguments of argparse's add_argument
        usage: `arguments` without a dash, as the usage prints them
    """

    function: str
    description: str
    flags: tuple[str, ...]
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    usage: str = ""


_MODEL_FLAGS = ("train.run_name", "train.device", "general")
_VERIFY = {"action": "store_true", "help": "compare every hash as well"}

COMMANDS = {
    "prepare": Command(
        "app.tools.prepare:prepare",
        "Turn text into verified token shards.",
        ("prepare", "general"),
    ),
    "train": Command(
        "app.train.start:start_training",
        "Train a GPT on the shards; continue the run if it exists.",
        ("train", "model", "general"),
    ),
    "sample": Command(
        "app.tools.sample:sample",
        "Print text that a trained model generates.",
        ("sample", *_MODEL_FLAGS),
    ),
    "playground": Command(
        "app.tools.playground.server:playground",
        "Serve a page on this machine on which to try a trained model.",
        ("playground", *_MODEL_FLAGS),
    ),
    "evaluate": Command(
        "app.tools.evaluate:evaluate",
        "Measure a trained model's loss on held-out text.",
        ("evaluate", "train.dataset_dir", *_MODEL_FLAGS),
    ),
    "inspect": Command(
        "app.tools.inspect:inspect",
        "Describe and verify a shard, a dataset folder, a checkpoint or a run.",
        ("general",),
        {
            "path": {"metavar": "PATH", "help": "as it is, or below DATA_DIR"},
            "--verify": _VERIFY,
        },
        usage="PATH ",
    ),
    "doctor": Command(
        "app.tools.doctor.doctor:doctor",
        "Check the machine and estimate the run before it costs money.",
        ("train", "model", "general"),
        {
            "--verify": _VERIFY,
            "--json": {
                "action": "store_true",
                "dest": "as_json",
                "help": "print one JSON object instead of a table",
            },
        },
    ),
    "report": Command(
        "app.tools.report.report:report",
        "Make a page and pictures of how one or several runs have learned.",
        ("train.run_name", "general"),
        {
            "runs": {
                "metavar": "RUN",
                "nargs": "*",
                "help": "below DATA_DIR/runs; by default TRAIN_RUN_NAME",
            }
        },
        usage="[RUN ...] ",
    ),
    "export": Command(
        "app.tools.export.export:export",
        "Write a trained model as a folder that transformers and other tools load.",
        ("export", "train.run_name", "train.dataset_dir", "general"),
    ),
}

_EPILOG = """\
Every setting is a flag, an environment variable, a line of .env or of a recipe;
the first of these that sets it wins. .env.example lists all settings.

The order of work:
  RECIPE=demo {program} doctor      what is missing, how long it takes
  RECIPE=demo {program} prepare     text -> shards
  RECIPE=demo {program} train       shards -> a trained GPT
  RECIPE=demo {program} sample      text from the GPT
  RECIPE=demo {program} report      how it learned, as a page and pictures
"""


def run_command(words: Sequence[str]) -> None:
    """Run the command that the words name.

    Raises:
        AppError: the words or a setting are wrong, or the command failed.
        ExitWithCode: there are no words, so the help is printed.
        SystemExit: the words ask for the help.
    """
    parser = _build_parser()
    if not words:
        parser.print_help(sys.stderr)
        raise ExitWithCode(ExitCode.USER)
    if words[0] not in (*COMMANDS, "-h", "--help"):
        parser.error(f"{words[0]!r} is not a command{suggestion(words[0], COMMANDS)}")
    flags, options = parser.parse(words)
    name = options.pop("command")
    settings = load_settings(flags, name)
    resolve_name(COMMANDS[name].function)(settings, **options)


def _build_parser() -> Parser:
    parser = Parser(
        prog=program(),
        description="From raw web text to a trained GPT-2.",
        epilog=_EPILOG.format(program=program()),
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.description,
            description=command.description,
            usage=f"{program()} {name} {command.usage}[--SETTING VALUE ...]",
        )
        for argument, options in command.arguments.items():
            subparser.add_argument(argument, **options)
        subparser.add_settings(command.flags)
    return parser
