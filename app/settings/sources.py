"""The sources of settings: flag, environment, .env, recipe, default. The first with a value counts.

Every fault is reported before anything starts, together with its origin: invalid values, unknown
names, unreadable lines, conflicting settings.
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
from app.settings.settings import GROUPS, VARIABLES, Settings
from app.settings.types import Group

RECIPES = Path(__file__).parents[1] / "recipes"
DOTENV = Path(".env")
_KNOWN = (*VARIABLES, *containers.VARIABLES)
_PREFIXES = tuple(group.prefix() for group in GROUPS.values() if group.prefix())


@dataclass(frozen=True)
class Value:
    """The text of a setting, and where it was set."""

    text: str
    origin: str


Values = dict[str, Value]  # by environment variable


def load_settings(flags: Mapping[str, str], command: str) -> Settings:
    """Resolve and validate every setting.

    Args:
        flags: texts given on the command line, by environment variable.
        command: the command whose help an error names.

    Raises:
        UserError: naming every invalid setting and its origin.
    """
    values, faults, is_complete = _collect(flags)
    groups: dict[str, Group] = {}
    reasons: dict[str, str] = {}
    for name, group in GROUPS.items():
        groups[name], reasons_in_group = _validate(group, values)
        reasons |= reasons_in_group
    faults += [f"{_describe(name, values)}: {reason}" for name, reason in reasons.items()]
    settings = Settings(**groups)
    if is_complete:
        faults += [
            f"{_describe(first, values)} and {_describe(other, values)}: {reason}"
            for (first, other), reason in settings.conflicts().items()
            if not reasons.keys() & {first, other}
        ]
    if faults:
        problem, fix = faults[0], "correct it"
        if len(faults) > 1:
            lines = "".join(f"\n  {fault}" for fault in faults)
            problem, fix = f"{len(faults)} settings are wrong:{lines}", "correct them"
        where = f"`{program()} {command} --help` and .env.example explain every setting"
        raise UserError(problem, f"{fix}; {where}")
    return settings


def _collect(flags: Mapping[str, str]) -> tuple[Values, list[str], bool]:
    """Return all values, the faults in names and lines, and True if no value can be missing.

    An unreadable recipe may hold what would resolve a conflict.
    """
    from_flags = {name: Value(text, f"flag {flag_name(name)}") for name, text in flags.items()}
    environment = {
        name.upper(): Value(text, "environment") for name, text in os.environ.items() if text
    }
    dotenv, faults = _read(DOTENV, str(DOTENV)) if DOTENV.exists() else ({}, [])
    above = dotenv | environment | from_flags
    recipe, recipe_faults = _read_recipe(above["RECIPE"]) if "RECIPE" in above else ({}, [])
    faults += recipe_faults
    # In a container the whole environment is ours, and holds what .env sets.
    faults += _unknown_names(environment, _has_prefix_or_typo if in_container() else _has_prefix)
    faults += _unknown_names(dotenv, _has_prefix_or_typo)
    faults += _unknown_names(recipe, bool)
    return recipe | above, faults, not recipe_faults


def _read(path: Path, name: str) -> tuple[Values, list[str]]:
    """Return the values that a file sets, and the faults in its lines."""
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
                faults.append(f"{variable} is set twice in {name}: lines {lines[variable]}, {line}")
            lines[variable] = line
    values = {
        variable.upper(): Value(value, f"{name}, line {lines[variable.upper()]}")
        for variable, value in dotenv_values(stream=io.StringIO(readable)).items()
        if value
    }
    return values, faults


def _read_recipe(recipe: Value) -> tuple[Values, list[str]]:
    name, is_file = recipe.text, "/" in recipe.text
    path = Path(name) if is_file else RECIPES / f"{name}.env"
    if not path.is_file():
        fault = f"RECIPE={name} ({recipe.origin}): there is no such "
        known = sorted(path.stem for path in RECIPES.glob("*.env"))
        known_recipes = f"recipe among {', '.join(known)}{suggestion(name, known)}"
        return {}, [fault + ("file" if is_file else known_recipes)]
    values, faults = _read(path, name if is_file else f"recipes/{path.name}")
    if "RECIPE" in values:
        faults.append(f"RECIPE ({values.pop('RECIPE').origin}): a recipe cannot name another")
    return values, faults


def _unknown_names(values: Values, is_ours: Callable[[str], object]) -> list[str]:
    return [
        f"{name} ({value.origin}): there is no such setting{suggestion(name, _KNOWN)}"
        for name, value in values.items()
        if name not in _KNOWN and is_ours(name)
    ]


def _has_prefix(name: str) -> bool:
    return name.startswith(_PREFIXES)


def _has_prefix_or_typo(name: str) -> bool:
    return _has_prefix(name) or bool(difflib.get_close_matches(name, _KNOWN, cutoff=0.85))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` with the closest known name, if one is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def flag_name(variable: str) -> str:
    """Return the flag of a variable: TRAIN_MAX_STEPS -> --max-steps."""
    return f"--{VARIABLES[variable].variables()[variable]}".replace("_", "-")


def _validate(group: type[Group], values: Values) -> tuple[Group, dict[str, str]]:
    """Build a group, with defaults in place of invalid values; return the reasons by variable."""
    fields = {name: field for name, field in group.variables().items() if name in values}
    texts: dict[str, Any] = {field: values[name].text for name, field in fields.items()}
    try:
        return group(**texts), {}
    except ValidationError as error:
        details = {detail["loc"][0]: detail for detail in reversed(error.errors())}
    valid = {field: text for field, text in texts.items() if field not in details}
    reasons = {name: _reason(details[field]) for name, field in fields.items() if field in details}
    return group(**valid), reasons


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
    "string_pattern_mismatch": "must start with a letter or digit, and hold only these and . _ -",
}


def _reason(detail: ErrorDetails) -> str:
    reason = _REASONS.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    bounds = detail.get("ctx", {}).items()
    return reason.format_map({k: f"{v:g}" if isinstance(v, float) else v for k, v in bounds})


def _describe(variable: str, values: Values) -> str:
    if variable in values:
        return f"{variable}={values[variable].text} ({values[variable].origin})"
    group = VARIABLES[variable]
    return f"{variable}={group.default_text(group.variables()[variable])} (default)"
