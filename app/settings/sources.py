"""The sources of settings: flag, environment, .env, recipe, default. The first with a value counts.

Every fault is reported before anything starts, together with its origin: invalid values, unknown
names, unreadable lines, conflicting settings.
"""

import difflib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app import containers
from app.containers import in_container, is_first_process, list_of_settings, program
from app.errors import UserError
from app.settings.env_file import Value, Values, read_env_file
from app.settings.own_text import FITTED, fitted, own_text_settings
from app.settings.settings import GROUPS, VARIABLES, Settings
from app.settings.types import Group

RECIPES = Path(__file__).parents[1] / "recipes"
DOTENV = Path(".env")
_KNOWN = (*VARIABLES, *containers.VARIABLES)
_PREFIXES = tuple(group.prefix() for group in GROUPS.values() if group.prefix())
_WITHOUT_PREFIX = {field.upper() for group in GROUPS.values() for field in group.model_fields}


def load_settings(flags: Mapping[str, str], command: str) -> Settings:
    """Resolve and validate every setting.

    Args:
        flags: texts given on the command line, by environment variable.
        command: the command whose help an error names.

    Raises:
        UserError: naming every invalid setting and its origin.
    """
    (settings,) = load_each([flags], command)
    warn_of_unlikely_names()
    return settings


def warn_of_unlikely_names() -> None:
    """Print a warning for each variable that may have been meant as a setting, but is not one."""
    for unlikely in _unknown_names(_environment(), 2) if is_first_process() else ():
        print(f"warning: {unlikely}", file=sys.stderr, flush=True)


def load_each(
    command_lines: Sequence[Mapping[str, str]],
    command: str,
    *,
    swept: Collection[str] = (),
    faults: Sequence[str] = (),
) -> list[Settings]:
    """Return the settings of several command lines, whose faults are reported together.

    Args:
        swept: variables whose texts come from --set, not from flags of their own.
        faults: others to report with them.
    """
    loaded = [_load(flags, command, swept) for flags in command_lines]
    every = [*dict.fromkeys([*faults, *(fault for _, its_own in loaded for fault in its_own)])]
    if every:
        problem, fix = every[0], "correct it"
        if len(every) > 1:
            lines = "".join(f"\n  {fault}" for fault in every)
            problem, fix = f"{len(every)} settings are wrong:{lines}", "correct them"
        places = f"`{program()} {command} --help` and {list_of_settings()}"
        raise UserError(problem, f"{fix}; {places} explain every setting")
    return [settings for settings, _ in loaded]


def _load(
    flags: Mapping[str, str], command: str, swept: Collection[str]
) -> tuple[Settings, list[str]]:
    """Return all settings, with defaults in place of invalid values, and every fault."""
    values, faults, is_complete = _collect(flags, command, _environment(), swept)
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
            # The model's settings come with its weights: app.train.init_from.
            and not (settings.train.init_from and f"{first} {other}".count("MODEL_"))
        ]
    data_dir = settings.general.data_dir
    if not Path(next(filter(os.path.lexists, (data_dir, *data_dir.parents)), ".")).is_dir():
        found = "there is a file, or a link to nothing, instead of a folder"
        faults.append(f"{_describe('DATA_DIR', values)}: {found}")
    if "HF_TOKEN" in values and len(token := values["HF_TOKEN"].text) > 7:
        faults = [fault.replace(token, "(HF_TOKEN)") for fault in faults]
    return settings, faults


def resolve(flags: Mapping[str, str], command: str, *, with_environment: bool = False) -> Settings:
    """Return the settings of a command that has these flags and .env, with defaults for the rest.

    Without the environment, it still has what a container always has.
    """
    always = {"DATA_DIR"} if in_container() else set()
    known = _environment()
    if not with_environment:
        known = {name: known[name] for name in always & known.keys()}
    return _provisional(_collect(flags, command, known)[0])


def _collect(
    flags: Mapping[str, str], command: str, environment: Values, swept: Collection[str] = ()
) -> tuple[Values, list[str], bool]:
    """Return all values, the faults in names and lines, and True if no value can be missing.

    A faulty line may have been meant to set what would resolve a conflict.
    """
    from_flags = {
        name: Value(text, "--set" if name in swept else f"flag {flag_name(name)}")
        for name, text in flags.items()
    }
    faults = [
        f"{name} ({from_flags.pop(name).origin}): has no value; give it one, or leave the flag out"
        for name, text in flags.items()
        if not text and _default(name) != ""
    ]
    dotenv: Values = {}
    recipe: Values = {}
    # A link to nowhere is an error, unlike a missing file.
    if os.path.lexists(DOTENV):
        dotenv, faults_of_dotenv = read_env_file(DOTENV, str(DOTENV), os.environ)
        faults += faults_of_dotenv
    above = dotenv | environment | from_flags
    above |= _own_text(above, command)
    if "RECIPE" in above:
        recipe, faults_of_recipe = _read_recipe(above["RECIPE"], dotenv)
        faults += faults_of_recipe
        if "TRAIN_INIT_FROM" in above:
            # Those of a recipe describe another model.
            recipe = {name: it for name, it in recipe.items() if not name.startswith("MODEL_")}
    is_complete = not faults
    # In a container the whole environment is ours, and holds what .env sets.
    faults += _unknown_names(environment, 2 if in_container() else 3)
    faults += _unknown_names(dotenv, 1)
    faults += _unknown_names(recipe, 0)
    return _fit(recipe | above), faults, is_complete


def _own_text(above: Values, command: str) -> Values:
    """Return the recipe and the dataset of own text, if the command is about it."""
    texts = {name: value.text for name, value in above.items()}
    found = own_text_settings(texts, command, _provisional(above).prepare_dir)
    return {name: Value(text, "own text") for name, text in found.items() if name not in texts}


def _fit(values: Values) -> Values:
    """Replace `auto` where it stands for what fits the text; see app.settings.own_text."""
    unknown = {name for name in FITTED if name in values and values[name].text == "auto"}
    if not unknown:
        return values
    known = {name: value for name, value in values.items() if name not in unknown}
    settings = _provisional(known)
    chosen = fitted(settings, FITTED & known.keys())
    if "TRAIN_INIT_FROM" in known:
        # The model's settings come with its weights.
        unknown = {name for name in unknown if not name.startswith("MODEL_")}
    origin = f"chosen for the text in {settings.train_dataset_dir}"
    return known | {name: Value(str(chosen[name]), origin) for name in unknown}


def _provisional(values: Values) -> Settings:
    """Return the settings with defaults in place of invalid values."""
    return Settings(**{name: _validate(group, values)[0] for name, group in GROUPS.items()})


def _environment() -> Values:
    return {name.upper(): Value(text, "environment") for name, text in os.environ.items() if text}


def _read_recipe(recipe: Value, dotenv: Values) -> tuple[Values, list[str]]:
    name, is_file = recipe.text, "/" in recipe.text
    path = Path(name) if is_file else RECIPES / f"{name}.env"
    if not path.is_file():
        fault = f"RECIPE={name} ({recipe.origin}): there is no such "
        known = recipe_names()
        meant = f"; did you mean ./{name}?" if Path(name).is_file() else suggestion(name, known)
        return {}, [fault + ("file" if is_file else f"recipe among {', '.join(known)}{meant}")]
    defined = {name: value.text for name, value in dotenv.items()} | os.environ
    values, faults = read_env_file(path, name if is_file else f"recipes/{path.name}", defined)
    if faults and not values.keys() & set(_KNOWN):
        values = {}  # The file is of another kind: naming its variables would not help.
    if "RECIPE" in values:
        faults.append(f"RECIPE ({values.pop('RECIPE').origin}): a recipe cannot name another")
    return values, faults


def recipe_names() -> list[str]:
    """Return the names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.env"))


def _unknown_names(values: Values, least: int) -> list[str]:
    """Return a fault for each name that is no setting, but likely enough meant as one."""
    return [
        f"{name} ({value.origin}): there is no such setting{suggestion(name, _KNOWN)}"
        for name, value in values.items()
        # A variable that another line uses has a purpose, unless it is surely a misspelt setting.
        if name not in _KNOWN and (3 if value.is_used else least) <= _likeness(name)
    ]


def _likeness(name: str) -> int:
    """Return how likely a name means a setting: 3 TRIAN_SEED, 2 DATADIR, 1 MAX_STEPS, 0 SEED."""
    letters = sorted(name.replace("_", ""))
    close = difflib.get_close_matches(name, _KNOWN, cutoff=0.85)
    close += [one for one in _KNOWN if sorted(one.replace("_", "")) == letters]
    of_settings = [one for one in close if one.startswith(_PREFIXES) or sorted(one) == sorted(name)]
    if name.startswith(_PREFIXES) or of_settings:
        return 3
    return 2 if close else int("_" in name and name in _WITHOUT_PREFIX)


def suggestion(name: str, known: Collection[str]) -> str:
    """Return `; did you mean …?` with the known names that are close, if there are any.

    --lr is --learning-rate, --batch-size --micro-batch-size, TRAIN_NUM_LAYERS MODEL_NUM_LAYERS.
    """
    prefix = next(filter(name.startswith, _PREFIXES), "")
    rest = name.removeprefix(prefix)
    # All names with one prefix are a little alike, so only the rest counts.
    names = {_words(one.removeprefix(prefix)): one for one in known if one.startswith(prefix)}
    wanted = _words(rest)
    found = (
        [it for it in names if wanted == "".join(word[:1] for word in it.split("_"))]
        or [it for it in names if len(wanted) > 1 and f"_{wanted}" in f"_{it}"]
        or difflib.get_close_matches(wanted, sorted(names), n=1, cutoff=0.72)
    )
    prefixed = [f"{other}{rest}" for other in _PREFIXES if f"{other}{rest}" in known]
    close = sorted(names[it] for it in found)
    meant = (close or prefixed if prefix else prefixed or close)[:3]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _words(name: str) -> str:
    return name.strip("-").replace("-", "_").lower()


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
    "float_type": "must be a smaller number",
    "finite_number": "must be a finite number",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must start with a letter or digit, and hold only A-Z a-z 0-9 . _ -",
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


def _default(variable: str) -> object:
    group = VARIABLES[variable]
    return group.model_fields[group.variables()[variable]].default
