"""Where settings come from: flag, environment, .env, recipe, default, the first that has one.

Every fault is reported, with the place it stands in, before anything starts: values that do not
fit, names that nobody knows, settings that contradict each other.
"""

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from app.errors import UserError
from app.settings import Group, Settings

RECIPES = Path(__file__).parent.parent / "recipes"
DOTENV = Path(".env")
VARIABLES = {name: group for group in Settings.GROUPS.values() for name in group.variables()}
_PREFIXES = tuple(group.prefix() for group in Settings.GROUPS.values() if group.prefix())


def load_settings(flags: Mapping[str, str], command: str) -> Settings:
    """Resolve and validate every setting.

    Args:
        flags: environment variable name -> text given on the command line.
        command: shown in the fix of an error.

    Raises:
        UserError: naming every invalid setting and where it stands.
    """
    recipe = _recipe_path(flags)
    places = {
        "flag": flags,
        "environment": os.environ,
        str(DOTENV): _read(DOTENV),
        str(recipe): _read(recipe) if recipe else {},
    }
    faults = [
        fault
        for place, values in places.items()
        if place != "flag"
        for fault in _unknown_names(place, values, every_name=place == str(recipe))
    ]
    env_files = [path for path in (recipe, DOTENV) if path is not None]
    groups: dict[str, Group] = {}
    for group_name, group in Settings.GROUPS.items():
        given: dict[str, Any] = {
            field: flags[name] for name, field in group.variables().items() if name in flags
        }
        try:
            groups[group_name] = group(_env_file=env_files, **given)
        except ValidationError as error:
            faults += [_describe(detail, group, places) for detail in error.errors()]
    if not faults:
        try:
            return Settings(**groups)
        except ValidationError as error:
            faults = [_reason(detail) for detail in error.errors()]
    listed = "\n".join(f"  {fault}" for fault in faults)
    raise UserError(
        f"{len(faults)} invalid setting{'s' if len(faults) > 1 else ''}:\n{listed}",
        f"correct {'them' if len(faults) > 1 else 'it'}; "
        f"`python -m app {command} --help` and .env.example explain every setting",
    )


def _recipe_path(flags: Mapping[str, str]) -> Path | None:
    name = flags.get("RECIPE") or os.environ.get("RECIPE") or _read(DOTENV).get("RECIPE")
    if not name:
        return None
    known = sorted(path.stem for path in RECIPES.glob("*.env"))
    if name not in known:
        raise UserError(
            f"no recipe is called {name!r}{_suggestion(name, known)}",
            f"choose one of: {', '.join(known)}",
        )
    return RECIPES / f"{name}.env"


def _read(path: Path) -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(path).items()}


def _unknown_names(place: str, values: Mapping[str, str], *, every_name: bool) -> list[str]:
    return [
        f"{name} ({place}): no such setting{_suggestion(name.upper(), VARIABLES)}"
        for name in values
        if name.upper() not in VARIABLES and (every_name or name.upper().startswith(_PREFIXES))
    ]


def _suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _describe(
    detail: ErrorDetails, group: type[Group], places: Mapping[str, Mapping[str, str]]
) -> str:
    if not detail["loc"]:
        return _reason(detail)
    # An alias path may stand in `loc`; its head always leads back to one field.
    head = str(detail["loc"][0]).lower().removeprefix(group.prefix().lower())
    variable = f"{group.prefix()}{head}".upper()
    for place, values in places.items():
        folded = {name.upper(): value for name, value in values.items()}
        if folded.get(variable):
            return f"{variable}={folded[variable]} ({place}): {_reason(detail)}"
    return f"{variable}: {_reason(detail)}"


def _reason(detail: ErrorDetails) -> str:
    reason = detail["msg"].removeprefix("Value error, ")
    return reason[0].lower() + reason[1:] if reason.startswith(("Input", "String")) else reason


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints look like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(message, f"see `{self.prog} --help`")


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add a flag for each setting, named `group` (all of its settings) or `group.field`."""
    for name in names:
        group_name, _, only = name.partition(".")
        group = Settings.GROUPS[group_name]
        section = parser.add_argument_group(f"{group_name} settings")
        for variable, field in group.variables().items():
            if only in ("", field) and field != "hf_token":
                section.add_argument(
                    f"--{field.replace('_', '-')}",
                    dest=variable,
                    metavar=_metavar(group.model_fields[field]),
                    help=_help(variable, group.model_fields[field]),
                )


def _metavar(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    text = str(field.annotation)
    return next((word for kind, word in _METAVARS.items() if kind in text), "TEXT")


_METAVARS = {"bool": "true|false", "Path": "PATH", "tuple": "A,B", "float": "X", "int": "N"}


def default_text(field: FieldInfo) -> str:
    """The default as it is written in an environment variable."""
    default = field.default
    if default is None or default is PydanticUndefined:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(str(part) for part in default)
    return str(default)


def _help(variable: str, field: FieldInfo) -> str:
    default = default_text(field)
    shown = f" [{default}]" if default else ""
    return f"{field.description}{shown} ({variable})".replace("%", "%%")


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Take --total_tokens for --total-tokens."""
    return [
        flag.replace("_", "-") + equals + value if argument.startswith("--") else argument
        for argument in arguments
        for flag, equals, value in [argument.partition("=")]
    ]


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Raise UserError for arguments that `parser` did not take, with the closest it would."""
    if unknown:
        faults = [
            f"{word}{_suggestion(word.partition('=')[0], _options(parser))}" for word in unknown
        ]
        parser.error(f"not understood: {', '.join(faults)}")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [f"--{word}" for word in re.findall(r"\[--([a-z-]+)", parser.format_usage())]
