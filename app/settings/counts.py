"""Counts as people write them: 20M, 1.5B, 1e7 and 20_000_000."""

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_WHOLE = "must be a whole number, such as 500, 20M, 1.5B or 1e7"


def read_count(value: object) -> object:
    """The whole number that a text means; anything but text stays as it is.

    Raises:
        ValueError: the text means no whole number.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    match = re.fullmatch(r"(-?[0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kmbt]?)", text)
    number = Decimal(match[1]) * _UNITS[match[2]] if match else None
    if number is None or number != int(number):
        raise ValueError(_WHOLE)
    return int(number)


def count_or(*words: str, at_most: int | None = None, at_least: int = 1) -> BeforeValidator:
    """Read a count within bounds, or one of the words that stand for one."""
    or_words = " or ".join(words)

    def read(value: object) -> object:
        word = str(value).strip().lower()
        if word in words:
            return word
        try:
            count = read_count(value)
        except ValueError:
            raise ValueError(f"{_WHOLE}, or {or_words}") from None
        if isinstance(count, int) and count < at_least:
            raise ValueError(f"must be at least {at_least}, or {or_words}")
        if isinstance(count, int) and at_most is not None and count > at_most:
            raise ValueError(f"must be at most {at_most}, or {or_words}")
        return count

    return BeforeValidator(read)


Count = Annotated[int, BeforeValidator(read_count)]
CountOrAll = Annotated[int | Literal["all"], count_or("all")]
