"""Files of settings, .env and recipes: lines NAME=VALUE, with Compose's rules for $NAME in them."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv.parser import Binding, parse_stream

# $$, $NAME, ${NAME}, ${NAME:-word}, ${NAME-word}, and the same with ? and +.
_REFERENCE = re.compile(
    r"\$(?:(\$)|(?P<plain>[A-Za-z_]\w*)|"
    r"\{(?:(?P<name>[A-Za-z_]\w*)(?:(?P<colon>:?)(?P<how>[-?+])(?P<word>[^${}]*))?\})?)",
    re.ASCII,
)


@dataclass(frozen=True)
class Value:
    """The text of a setting, where it was set, and whether other lines of a file refer to it."""

    text: str
    origin: str
    is_used: bool = False


Values = dict[str, Value]  # by environment variable


def read_env_file(path: Path, name: str, defined: Mapping[str, str]) -> tuple[Values, list[str]]:
    """Return the values that a file sets, and its faults. A variable without text is not set.

    Args:
        name: the file's name in messages.
        defined: variables that values may refer to; they win over those set above in the file.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return {}, [f"{name} cannot be read ({error.strerror}): make it readable, or move it away"]
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return {}, [f"{name}, line {line}: not UTF-8; save the file as UTF-8 text"]
    if "\0" in text:
        return {}, [f"{name} is UTF-16, or no text at all: save it as UTF-8 text"]
    used = {found["plain"] or found["name"] for found in _REFERENCE.finditer(text)}
    values: Values = {}
    faults: list[str] = []
    unreadable: list[str] = []
    lines: dict[str, int] = {}
    variables: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        original = binding.original.string
        before = original[: len(original) - len(original.lstrip())]
        line = binding.original.line + before.count("\n")
        if binding.error or (binding.key and binding.value is None):
            unreadable.append(str(line))
        elif binding.key:
            variable, origin = binding.key.upper(), f"{name}, line {line}"
            value, reasons = _expanded(binding, variables | dict(defined))
            variables[binding.key] = value
            faults += [f"{variable} ({origin}): {reason}" for reason in reasons]
            if binding.value and variable in lines:
                faults.append(f"{variable} is set twice in {name}: lines {lines[variable]}, {line}")
            if binding.value:
                lines[variable] = line
            if value and not reasons:
                values[variable] = Value(value, origin, binding.key in used)
    if unreadable:
        which = f"line{'s'[: len(unreadable) - 1]} {', '.join(unreadable[:3])}"
        more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        faults.insert(0, f"{name}, {which}{more}: not of the form NAME=VALUE")
    return values, faults


def _expanded(binding: Binding, defined: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return a line's value with the variables that it refers to, and what is wrong with these."""
    text, quote = binding.value or "", binding.original.string.partition("=")[2].lstrip()[:1]
    faults: list[str] = []

    def value_of(found: re.Match[str]) -> str:
        name, word = found["plain"] or found["name"], found["word"] or ""
        if not name and found[0] == "${":
            faults.append("${ must begin ${NAME} or ${NAME:-DEFAULT}; $$ is a dollar sign")
        if not name:
            return "$"
        is_set = bool(defined.get(name)) if found["colon"] else name in defined
        if found["how"] == "+":
            return word if is_set else ""
        if not is_set and found["how"] != "-":
            faults.append(
                f"${{{name}}} is not set{word and f' ({word})'}: set it in the environment or "
                f"above this line, or write ${{{name}:-DEFAULT}}; a $ that is only a $ goes into "
                "'single quotes'"
            )
        return defined[name] if is_set else word

    if quote == "'":
        return text, []
    # In double quotes, Compose takes a dollar sign after a backslash as it is.
    return _REFERENCE.sub(value_of, text.replace(r"\$", "$$") if quote == '"' else text), faults
