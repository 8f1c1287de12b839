"""Where settings come from: flag, environment, .env, recipe, default, the first that has one.

Every fault is reported, with the place it stands in, before anything starts: values that do not
fit, names that nobody knows, lines that say nothing, settings that contradict each other.
"""

import difflib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app import containers
from app.containers import in_container, program
from app.errors import UserError
from app.settings.groups import GROUPS, VARIABLES
from app.settings.settings import Settings
from app.settings.types import Group

RECIPES = Path(__file__).parents[1] / "recipes"
DOTENV = Path(".env")
_KNOWN = (*VARIABLES, *containers.VARIABLES)
_PREFIXES = tuple(group.prefix() for group in GROUPS.values() if group.prefix())


@dataclass(frozen=True)
class Given:
    """The text of a setting, and where it stands."""

    text: str
    place: str


Source = Mapping[str, Given]


def load_settings(flags: Mapping[str, str], command: str) -> Settings:
    """Resolve and validate every setting.

    Args:
        flags: environment variable name -> text given on the command line.
        command: shown in the fix of an error.

    Raises:
        UserError: naming every invalid setting and where it stands.
    """
    given, faults, is_whole = _collect(flags)
    groups: dict[str, Group] = {}
    wrong: set[str] = set()
    for group_name, group in GROUPS.items():
        groups[group_name], reasons = _validate(group, given)
        wrong |= reasons.keys()
        faults += [f"{_shown(name, given)}: {reason}" for name, reason in reasons.items()]
    settings = Settings(**groups)
    if is_whole:
        faults += [
            f"{_shown(one, given)} and {_shown(other, given)}: {reason}"
            for (one, other), reason in settings.conflicts().items()
            if not wrong & {one, other}
        ]
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise UserError(
            f"{len(faults)} settings are wrong:{listed}" if len(faults) > 1 else faults[0],
            f"correct {'them' if len(faults) > 1 else 'it'}; "
            f"`{program()} {command} --help` and .env.example explain every setting",
        )
    return settings


def _collect(flags: Mapping[str, str]) -> tuple[Source, list[str], bool]:
    """What is given for each variable, what is wrong with names and lines, and if that is all.

    A recipe that cannot be read may hold what would resolve a contradiction.
    """
    from_flags = {name: Given(text, f"flag {flag_name(name)}") for name, text in flags.items()}
    environment = {
        name.upper(): Given(text, "environment") for name, text in os.environ.items() if text
    }
    dotenv, faults = _read(DOTENV, str(DOTENV)) if DOTENV.exists() else ({}, [])
    above = {**dotenv, **environment, **from_flags}
    recipe, recipe_faults = _read_recipe(above["RECIPE"]) if "RECIPE" in above else ({}, [])
    faults += recipe_faults
    # In a container the environment is ours, and .env comes with it.
    is_all_ours = in_container()
    faults += _unknown(
        environment,
        lambda name: name.startswith(_PREFIXES) or (is_all_ours and _is_misspelt(name)),
    )
    faults += _unknown(dotenv, lambda name: name.startswith(_PREFIXES) or _is_misspelt(name))
    faults += _unknown(recipe, lambda _: True)
    return recipe | above, faults, not recipe_faults


def _read(path: Path, name: str) -> tuple[dict[str, Given], list[str]]:
    """The settings that a file gives, and what is wrong with its lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return {}, [f"{name} is not UTF-8 text"]
    faults: list[str] = []
    lines: dict[str, int] = {}
    readable = ""
    for binding in parse_stream(io.StringIO(text)):
        original = binding.original.string
        before = original[: len(original) - len(original.lstrip())]
        line = binding.original.line + before.count("\n")
        if binding.error or (binding.key and binding.value is None):
            faults.append(f"{name}, line {line}: not of the form NAME=VALUE")
            continue
        readable += original
        if binding.key and binding.value:
            variable = binding.key.upper()
            if variable in lines:
                faults.append(f"{variable} stands twice in {name}: lines {lines[variable]}, {line}")
            lines[variable] = line
    values = dotenv_values(stream=io.StringIO(readable))
    given = {
        variable.upper(): Given(value, f"{name}, line {lines[variable.upper()]}")
        for variable, value in values.items()
        if value
    }
    return given, faults


def _read_recipe(chosen: Given) -> tuple[dict[str, Given], list[str]]:
    name = chosen.text
    path = Path(name) if "/" in name else RECIPES / f"{name}.env"
    if not path.is_file():
        known = sorted(path.stem for path in RECIPES.glob("*.env"))
        fault = f"RECIPE={name} ({chosen.place}): there is no such "
        if "/" in name:
            return {}, [f"{fault}file"]
        return {}, [f"{fault}recipe among {', '.join(known)}{suggestion(name, known)}"]
    given, faults = _read(path, name if "/" in name else f"recipes/{path.name}")
    if "RECIPE" in given:
        faults.append(f"RECIPE ({given.pop('RECIPE').place}): a recipe cannot name another")
    return given, faults


def _unknown(source: Source, is_ours: Callable[[str], bool]) -> list[str]:
    return [
        f"{name} ({given.place}): there is no such setting{suggestion(name, _KNOWN)}"
        for name, given in source.items()
        if name not in _KNOWN and is_ours(name)
    ]


def _is_misspelt(name: str) -> bool:
    return bool(difflib.get_close_matches(name, _KNOWN, cutoff=0.85))


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the closest known name, if one is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def flag_name(variable: str) -> str:
    """TRAIN_MAX_STEPS -> --max-steps."""
    return f"--{VARIABLES[variable].variables()[variable]}".replace("_", "-")


def _validate(group: type[Group], given: Source) -> tuple[Group, dict[str, str]]:
    """The group, with defaults for the values that do not fit; and why each of them does not."""
    fields = {name: field for name, field in group.variables().items() if name in given}
    texts: dict[str, Any] = {field: given[name].text for name, field in fields.items()}
    try:
        return group(**texts), {}
    except ValidationError as error:
        details = {detail["loc"][0]: detail for detail in reversed(error.errors())}
    fitting = {field: text for field, text in texts.items() if field not in details}
    reasons = {name: _reason(details[field]) for name, field in fields.items() if field in details}
    return group(**fitting), reasons


_REASONS = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "bool_parsing": "must be true or false",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must begin with a letter or digit, and hold only these and . _ -",
}


def _reason(detail: ErrorDetails) -> str:
    known = _REASONS.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    return known.format_map({name: _number(bound) for name, bound in detail.get("ctx", {}).items()})


def _number(bound: object) -> object:
    return f"{bound:g}" if isinstance(bound, float) else bound


def _shown(name: str, given: Source) -> str:
    if name in given:
        return f"{name}={given[name].text} ({given[name].place})"
    group = VARIABLES[name]
    return f"{name}={group.default_text(group.variables()[name])} (default)"
