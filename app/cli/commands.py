"""The commands: for each one its function, and the flags and arguments that it takes.

The functions are named, not imported: only the command that runs is imported, after its settings
have been checked.
"""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from app import __version__
from app.cli.parser import Parser
from app.cli.process import raise_on_signals
from app.containers import list_of_settings, program
from app.errors import ExitCode, ExitWithCode, UserError
from app.failures import check_torch_version
from app.settings.sources import flag_name, load_settings, recipe_names, suggestion
from app.streams import Output


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        function: `module:name`; called with the settings, and with each of `arguments` by name
        description: printed by the help
        flags: the settings that are flags; see app.cli.parser.Parser.add_settings
        also_read: prefixes of settings that the command reads but has no flags for
        arguments: further arguments -> keyword arguments of argparse's add_argument
        usage: `arguments` without a dash, as the usage prints them
        without_effect: (variable, argument, True or False): its flag has no effect beside the
            argument, or without it
        uses_torch: True if a torch that is too old is told before the command begins
        is_output: True if the output is the command's result: once it is lost, the command ends
        takes_flags: True if the function is called with the flags' texts by variable, and loads the
            settings itself
    """

    function: str
    description: str
    flags: tuple[str, ...]
    also_read: tuple[str, ...] = ()
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    usage: str = ""
    without_effect: tuple[tuple[str, str, bool], ...] = ()
    uses_torch: bool = False
    is_output: bool = False
    takes_flags: bool = False


_MODEL_FLAGS = ("train.run_name", "train.device", "general")
_JSON_HELP = "print one JSON object instead of a table"
_JSON = {"action": "store_true", "dest": "as_json", "help": _JSON_HELP}
_PATH_HELP = "path as given, or relative to DATA_DIR; by default the run's, or the latest run's"
_PATH = {"metavar": "PATH", "nargs": "?", "help": _PATH_HELP}
_RUNS_HELP = "below DATA_DIR/runs; by default TRAIN_RUN_NAME, or the latest run"
_RUNS = {"metavar": "RUN", "nargs": "*", "help": _RUNS_HELP}
_SERVE_HELP = "serve the page, which grows while runs train, until Ctrl-C"
_SERVE = {"action": "store_true", "help": _SERVE_HELP}
_RECIPE = {"metavar": "RECIPE", "nargs": "?", "help": "recipe of every run, such as demo"}
_SET_HELP = "values to combine, such as train.seed=0,1,2; a ; between them if they have commas"
_SET = {"action": "append", "default": [], "dest": "sets", "metavar": "NAME=VALUE,..."}
_VERIFY = {"action": "store_true", "help": "compare every hash as well"}

COMMANDS = {
    "prepare": Command(
        "app.tools.prepare:prepare",
        "Turn text into verified token shards.",
        ("prepare", "general"),
    ),
    "train": Command(
        "app.train.command:start_training",
        "Train a GPT on the shards; continue the run if it exists.",
        ("train", "model", "general"),
        also_read=("PREPARE_", "SAMPLE_"),
        uses_torch=True,
    ),
    "sweep": Command(
        "app.tools.sweep.sweep:sweep",
        "Train a run for each combination of values, and compare them.",
        ("train", "model", "general"),
        also_read=("PREPARE_", "SAMPLE_"),
        arguments={"recipe": _RECIPE, "--set": _SET | {"help": _SET_HELP}},
        usage="[RECIPE] --set NAME=VALUE,... ",
        without_effect=(("RECIPE", "recipe", True),),
        uses_torch=True,
        takes_flags=True,
    ),
    "sample": Command(
        "app.tools.sample:sample",
        "Print text that a trained model generates.",
        ("sample", *_MODEL_FLAGS),
        uses_torch=True,
        is_output=True,
    ),
    "playground": Command(
        "app.tools.playground.server:playground",
        "Serve a local web page for trying a trained model.",
        ("playground", *_MODEL_FLAGS),
        uses_torch=True,
    ),
    "evaluate": Command(
        "app.tools.evaluate:evaluate",
        "Measure a trained model's loss on held-out text.",
        ("evaluate", "train.dataset_dir", *_MODEL_FLAGS),
        uses_torch=True,
    ),
    "inspect": Command(
        "app.tools.inspect:inspect",
        "Describe and verify a shard, a dataset, a checkpoint or a run.",
        ("train.run_name", "general"),
        arguments={"path": _PATH, "--verify": _VERIFY},
        usage="[PATH] ",
        without_effect=(("TRAIN_RUN_NAME", "path", True),),
        is_output=True,
    ),
    "doctor": Command(
        "app.tools.doctor.doctor:doctor",
        "Check the machine and estimate the run before it costs money.",
        ("train", "model", "general"),
        also_read=("PREPARE_",),
        arguments={"--verify": _VERIFY, "--json": _JSON},
        is_output=True,
    ),
    "report": Command(
        "app.tools.report.report:report",
        "Write a page and pictures of how runs learned, or serve it.",
        ("report", "train.run_name", "general"),
        arguments={"runs": _RUNS, "--serve": _SERVE},
        usage="[RUN ...] ",
        without_effect=(
            ("TRAIN_RUN_NAME", "runs", True),
            ("REPORT_OUT", "--serve", True),
            ("REPORT_HOST", "--serve", False),
            ("REPORT_PORT", "--serve", False),
        ),
    ),
    "export": Command(
        "app.tools.export:export",
        "Write a trained model as a folder that transformers can load.",
        ("export", "train.run_name", "train.dataset_dir", "general"),
        uses_torch=True,
    ),
}

_HELP = """\
usage: {program} COMMAND [--SETTING VALUE ...]
       {program} --version | --env-example

From raw web text to a trained GPT-2.

commands:
{commands}

Every setting is a flag, an environment variable, a line of .env or of a recipe;
the first of these that sets it wins. `{program} COMMAND --help` explains
those of a command, and {settings} lists all.
{recipes}

The order of work:
  RECIPE=demo {program} doctor      what is missing, how long it takes
  RECIPE=demo {program} prepare     text -> shards
  RECIPE=demo {program} train       shards -> a trained GPT
  RECIPE=demo {program} sample      text from the GPT
  RECIPE=demo {program} report      how it learned, as a page and pictures
"""


def run_command(argv: Sequence[str]) -> None:
    """Run the command given by the arguments, or print the help.

    Raises:
        AppError: an argument or a setting is wrong, or the command failed.
        SystemExit: the arguments request a command's help.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = (f"    {name:<11} {command.description}" for name, command in COMMANDS.items())
        text = _HELP.format(
            program=program(),
            commands="\n".join(lines),
            settings=list_of_settings(),
            recipes=textwrap.fill(f"Recipes: {', '.join(recipe_names())}.", 80),
        )
        print(text, end="", file=sys.stdout if argv else sys.stderr)
        if argv:
            return
        raise ExitWithCode(ExitCode.USER)
    name, *arguments = argv
    if name == "--version":
        print(f"gpt-compose {__version__}")
        return
    if name == "--env-example":
        print(resolve_name("app.settings.__main__:env_example")(), end="")
        return
    if name not in COMMANDS:
        problem = f"{name!r} is not a command{suggestion(name, COMMANDS)}"
        raise UserError(problem, f"see `{program()} --help`")
    command, prog = COMMANDS[name], f"{program()} {name}"
    usage = f"{prog} {command.usage}[--SETTING VALUE ...]"
    parser = Parser(
        prog=prog, usage=usage, description=command.description, also_read=command.also_read
    )
    for argument, details in command.arguments.items():
        parser.add_argument(argument, **details)
    parser.add_settings(command.flags)
    flags, options = parser.parse(arguments)
    _check_effects(command, flags, options)
    settings = flags if command.takes_flags else load_settings(flags, name)
    if command.is_output and isinstance(sys.stdout, Output):
        sys.stdout.must_arrive = True
    if command.uses_torch:
        check_torch_version()
    function = resolve_name(command.function)
    raise_on_signals()
    function(settings, **options)


def _check_effects(
    command: Command, flags: Mapping[str, str], options: Mapping[str, object]
) -> None:
    """Raise UserError if a flag has no effect because of the other arguments."""
    for variable, argument, is_beside in command.without_effect:
        if variable in flags and bool(options[argument.lstrip("-")]) == is_beside:
            flag, other = flag_name(variable), command.arguments[argument].get("metavar", argument)
            raise UserError(
                f"{flag} has no effect {'beside' if is_beside else 'without'} {other}",
                "leave one of them out" if is_beside else f"add {other}, or leave {flag} out",
            )
