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

    def __init__(self, *, also_read: Sequence[str] = (), **options: Any) -> None:
        self._read = {"", *also_read}
        width = min(100, shutil.get_terminal_size().columns)
        layout = partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=28)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        flag, _, rest = message.removeprefix("argument ").partition(": expected one argument")
        if flag.startswith("--") and not rest:
            raise UserError(
                f"{flag} has no value",
                f"give it one; if it begins with a dash, as in -x, write {flag}=-x",
            )
        raise UserError(message, f"see `{self.prog} --help`")

    def add_settings(self, names: Sequence[str]) -> None:
        """Add a flag for each setting, named `group` (all of its settings) or `group.field`."""
        sections: dict[str, Any] = {}
        for name in names:
            group_name, _, only = name.partition(".")
            group = GROUPS[group_name]
            if not only:
                self._read.add(group.prefix())
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
                        metavar=_metavar(group.model_fields[field].annotation),
                        help=help_text.replace("%", "%%"),
                    )

    def parse(self, words: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
        """Return the raw flag values by variable name, and the other arguments by name.

        --total_tokens is accepted for --total-tokens.

        Raises:
            UserError: there are unknown or missing arguments.
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
        if word in self._option_string_actions:
            return ""  # A known flag, but after `--`.
        same = [name for name in VARIABLES if word.partition("=")[0] in (name, flag_name(name))]
        if not same:
            return suggestion(word, self._option_string_actions)
        if read := [name for name in same if VARIABLES[name].prefix() in self._read]:
            return f" (set {' or '.join(read)} in the environment or in .env)"
        groups = " and of ".join(VARIABLES[name].prefix().rstrip("_").lower() for name in same)
        return f" (a setting of {groups})"


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = {"bool": "true|false", "Path": "PATH", "tuple": "X,Y", "float": "X", "int": "N"}
    kind = next((metavar for kind, metavar in kinds.items() if kind in str(annotation)), "TEXT")
    choices = [part for part in get_args(annotation) if get_origin(part) is Literal]
    return "|".join([kind, *(word for part in choices for word in get_args(part))])
