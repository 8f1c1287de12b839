"""The command line's flags: one for each setting of a command."""

import argparse
import re
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NoReturn, get_args, get_origin

from app.errors import UserError
from app.settings.settings import GROUPS, VARIABLES
from app.settings.sources import flag_name, suggestion


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, and whose help fits the terminal."""

    def __init__(self, **options: Any) -> None:
        width = min(100, shutil.get_terminal_size().columns)
        layout = partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=28)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(message, f"see `{self.prog} --help`")

    def add_settings(self, names: Sequence[str]) -> None:
        """Add a flag for each setting, named `group` (all of its settings) or `group.field`."""
        sections: dict[str, Any] = {}
        for name in names:
            group_name, _, only = name.partition(".")
            group = GROUPS[group_name]
            if group_name not in sections:
                sections[group_name] = self.add_argument_group(f"{group_name} settings")
            for variable, field in group.variables().items():
                # A secret on the command line would show in the list of processes.
                if only in ("", field) and field != "hf_token":
                    default = f" [{text}]" if (text := group.default_text(field)) else ""
                    help_text = f"{group.description(field)}{default} ({variable})"
                    sections[group_name].add_argument(
                        flag_name(variable),
                        dest=variable,
                        action=_Once,
                        metavar=_metavar(group.model_fields[field].annotation),
                        help=help_text.replace("%", "%%"),
                    )

    def parse(self, words: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
        """Return the raw flag values by variable name, and the other arguments by name.

        --total_tokens is accepted for --total-tokens.

        Raises:
            UserError: there are unknown, repeated or missing arguments.
        """
        parts = [word.partition("=") for word in words]
        words = [
            flag.replace("_", "-") + equals + value if re.fullmatch(r"--\w+", flag) else word
            for word, (flag, equals, value) in zip(words, parts, strict=True)
        ]
        parsed, unknown = self.parse_known_args(words)
        # The word after an unknown flag may be a secret.
        unknown_flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        faults = [f"{word}{self._hint(word)}" for word in unknown_flags or unknown]
        if faults:
            self.error(f"unknown argument: {', '.join(faults)}")
        options = vars(parsed)
        flags = {name: options.pop(name) for name in VARIABLES if name in options}
        return {name: text for name, text in flags.items() if text is not None}, options

    def _hint(self, word: str) -> str:
        same = [name for name in VARIABLES if word.partition("=")[0] in (name, flag_name(name))]
        if same:
            return f" (set {' or '.join(same)} in the environment or in .env)"
        return suggestion(word, self._option_string_actions)


class _Once(argparse.Action):
    """Store the text of a flag; refuse a second one, and an empty one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            raise UserError(
                f"{option_string} is given twice: {before} and {values}", "give it once"
            )
        group = VARIABLES[self.dest]
        if not values and group.model_fields[group.variables()[self.dest]].default != "":
            raise UserError(f"{option_string} has no value", "give it one, or leave the flag out")
        setattr(namespace, self.dest, values)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = {"bool": "true|false", "Path": "PATH", "tuple": "X,Y", "float": "X", "int": "N"}
    kind = next((metavar for kind, metavar in kinds.items() if kind in str(annotation)), "TEXT")
    choices = [part for part in get_args(annotation) if get_origin(part) is Literal]
    return "|".join([kind, *(word for part in choices for word in get_args(part))])
