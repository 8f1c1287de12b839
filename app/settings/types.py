"""The types of settings: how texts become values, and what all groups of settings share."""

import re
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# Libraries store counts in 64 bits.
_MAX_COUNT = 10**18
_RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NOT_A_COUNT = "must be a whole number, such as 500, 20M, 1.5B or 1e7"


def parse_count(value: object) -> object:
    """Return the whole number in a text: 20M, 1.5B, 1e7 or 20_000_000. Keep any other value.

    Raises:
        ValueError: the text is not a whole number.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    match = re.fullmatch(r"(-?[0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kmbt]?)", text)
    number = Decimal(match[1]) * _UNITS[match[2]] if match else None
    if number is None or number != int(number):
        raise ValueError(_NOT_A_COUNT)
    return int(number)


def count_or(*words: str, at_least: int = 1, at_most: int = _MAX_COUNT) -> BeforeValidator:
    """Accept a count within bounds, or one of the words."""
    or_words = f", or {' or '.join(words)}"

    def parse(value: object) -> object:
        word = str(value).strip().lower()
        if word in words:
            return word
        try:
            count = parse_count(value)
        except ValueError as error:
            raise ValueError(f"{error}{or_words}") from None
        if isinstance(count, int) and count < at_least:
            raise ValueError(f"must be at least {at_least}{or_words}")
        if isinstance(count, int) and count > at_most:
            raise ValueError(f"must be at most {at_most}{or_words}")
        return count

    return BeforeValidator(parse)


def parse_count_or_share(value: object) -> object:
    """Return a whole number, or a share below 1: 20, 0.001 or 0.1%. Keep any other value.

    Raises:
        ValueError: the text is neither.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    with suppress(ValueError):
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 <= share < 1:
            return share
    try:
        return parse_count(text)
    except ValueError as error:
        raise ValueError(f"{error}; or a share below 1, such as 0.1%") from None


def parse_encoding(value: object) -> object:
    """Return the name of a text encoding that Python knows.

    Raises:
        ValueError: there is no such encoding.
    """
    try:
        "".encode(str(value) or "utf-8")
    except (LookupError, ValueError):
        message = "must be an encoding that Python knows, such as latin-1, cp1252 or utf-16-le"
        raise ValueError(message) from None
    return value


def parse_list(value: object) -> object:
    """Split a text at its commas. Keep any other value."""
    return value.split(",") if isinstance(value, str) else value


def parse_pair(value: object) -> object:
    """Split a text such as 0.9,0.95 into its two parts. Keep any other value."""
    parts = parse_list(value)
    if isinstance(parts, list) and len(parts) != 2:
        raise ValueError("must be two numbers, as in 0.9,0.95")
    return parts


def parse_bool(value: object) -> object:
    """Return "true" or "false" for the usual words, and any other word in lower case."""
    word = str(value).strip().lower()
    is_true, is_false = word in ("1", "yes", "on", "true"), word in ("0", "no", "off", "false")
    return "true" if is_true else "false" if is_false else word


def parse_branch(value: object) -> object:
    """Return RUN or RUN@STEP, the step without leading zeros. Keep any value that is not a text.

    Raises:
        ValueError: the text is neither.
    """
    if not isinstance(value, str):
        return value
    name, at, step = value.partition("@")
    if not re.fullmatch(_RUN_NAME, name) or (at and not step.isdecimal()):
        raise ValueError("must be the name of a run, or NAME@STEP with the step of a checkpoint")
    return f"{name}@{int(step)}" if at else name


def parse_init_from(value: object) -> object:
    """Replace a leading ~ of a folder, which has to stay a text. Keep any other value."""
    return str(expand_home(value)) if str(value).startswith("~") else value


def parse_compile(value: object) -> object:
    """Return "true" for auto, model and blocks, which .env files may hold. Keep any other value."""
    return "true" if str(value).strip().lower() in ("auto", "model", "blocks") else value


def expand_home(value: object) -> object:
    """Replace a leading ~ by the home folder. Keep any value that is not a text."""
    try:
        return Path(value).expanduser() if isinstance(value, str) else value
    except RuntimeError:
        raise ValueError("begins with ~, but there is no such user's home folder") from None


Count = Annotated[int, BeforeValidator(parse_count), Field(le=_MAX_COUNT)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Seconds = Annotated[Number, Field(ge=0, le=86400)]
AutoOrBool = Annotated[Literal["auto", "true", "false"], BeforeValidator(parse_bool)]
RunName = Annotated[str, Field(pattern=f"^{_RUN_NAME}$", max_length=200)]
Location = Annotated[Path, BeforeValidator(expand_home)]


class Group(BaseSettings):
    """Settings that share a prefix."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: Any, init_settings: Any, *_others: Any, **_named: Any
    ) -> tuple[Any, ...]:
        """Leave all sources to app.settings.sources, which names each one in its errors."""
        return (init_settings,)

    @classmethod
    def prefix(cls) -> str:
        """Return the prefix of the group's environment variables."""
        return cls.model_config.get("env_prefix", "")

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Map environment variables to field names."""
        return {f"{cls.prefix()}{name}".upper(): name for name in cls.model_fields}

    @classmethod
    def description(cls, field: str) -> str:
        """Return a field's docstring on one line."""
        return " ".join((cls.model_fields[field].description or "").split())

    @classmethod
    def default_text(cls, field: str) -> str:
        """Return a field's default as the text of its variable; empty without a default."""
        default = cls.model_fields[field].default
        if isinstance(default, tuple):
            return ",".join(map(str, default))
        text = str(default)
        return "" if default is None else text.lower() if isinstance(default, bool) else text
