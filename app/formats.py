"""Numbers, durations and nested values as people read them."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

_SCALES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
_BYTE_SCALES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"))
_TIME_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_END_OF_TIME = datetime(9998, 12, 31).timestamp()


def format_count(value: float) -> str:
    """Return a number with three significant digits: 124439808 -> "124M"."""
    value = float(f"{value:.3g}")
    scale, unit = next((item for item in _SCALES if abs(value) >= item[0]), (1, ""))
    return f"{value / scale:.3g}{unit}"


def short_count(count: int) -> str:
    """Return the shortest exact form: 1_500_000_000 -> "1.5B", 20_000_001 -> "20000001"."""
    for scale, unit in _SCALES:
        tenths, rest = divmod(count * 10, scale)
        if tenths >= 10 and not rest:
            whole, tenth = divmod(tenths, 10)
            return f"{whole}{f'.{tenth}' if tenth else ''}{unit.upper()}"
    return str(count)


def plural(count: int, singular: str, plural_form: str = "") -> str:
    """Return a count with its noun: "1 step", "1,000 steps"."""
    return f"{count:,} {singular if count == 1 else plural_form or f'{singular}s'}"


def format_bytes(count: float) -> str:
    """Return bytes in decimal units, as disks are sold: 1_500_000_000 -> "1.5 GB"."""
    scale, unit = next((item for item in _BYTE_SCALES if count >= item[0]), (1000, "KB"))
    return f"{count / scale:.3g} {unit}"


def format_gib(count: float) -> str:
    """Return bytes in GiB, as memory is measured: 44_023_414_784 -> "41.0 GiB"."""
    return f"{count / 2**30:.1f} GiB"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: 159.5 -> "2 min 40 s", 6.31 -> "6.3 s"."""
    whole = round(seconds)
    for (unit, size), (smaller_unit, smaller_size) in pairwise(_TIME_UNITS):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller_unit}"
    return f"{seconds:.2g} s"


def format_clock(timestamp: float) -> str:
    """Return a local time: "14:32 UTC" if it is today, "30 Nov 2026 14:32 UTC" otherwise.

    Times after the year 9998 count as its end.
    """
    when = datetime.fromtimestamp(min(timestamp, _END_OF_TIME)).astimezone()
    is_today = when.date() == datetime.now().date()
    return when.strftime("%H:%M %Z" if is_today else "%d %b %Y %H:%M %Z")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return "KEY was X and is now Y" by key, for each key whose values differ."""
    return {
        key: f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    }


def flatten(value: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path of keys, value) of each value in nested dicts that is not a dict."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, *path, str(key))
    else:
        yield path, value


def named_values(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known values of settings.json, by names such as train.seed and device.name."""
    return {
        ".".join(path).removeprefix("settings."): value
        for path, value in flatten(metadata)
        if value is not None
    }
