import pytest

from app.formats import (
    differences,
    flatten,
    format_bytes,
    format_count,
    format_duration,
    format_gib,
    plural,
    short_count,
)


@pytest.mark.parametrize(
    ("value", "text"),
    (
        (0, "0"),
        (0.31, "0.31"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (8223.23, "8.22k"),
        (201937.3, "202k"),
        (999_950, "1M"),
        (19_922_944, "19.9M"),
        (124_439_808, "124M"),
        (1_558_000_000, "1.56B"),
        (10_000_000_000, "10B"),
        (15e12, "15T"),
    ),
)
def test_count_has_three_digits_and_a_unit(value: float, text: str) -> None:
    assert format_count(value) == text


def test_short_count_is_exact_beyond_the_precision_of_a_float() -> None:
    assert short_count(949_170_952_515_559_900) == "949170952515559.9K"
    assert short_count(1_500_000_000) == "1.5B"


@pytest.mark.parametrize(
    ("seconds", "text"),
    (
        (0.634, "0.63 s"),
        (6.31, "6.3 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (159.51, "2 min 40 s"),
        (3599.7, "1 h 0 min"),
        (5430, "1 h 30 min"),
        (93600, "1 d 2 h"),
    ),
)
def test_duration_has_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_bytes_are_decimal_for_disks_and_binary_for_memory() -> None:
    assert [format_bytes(10.0**n) for n in (3, 6, 9, 12)] == ["1 KB", "1 MB", "1 GB", "1 TB"]
    assert format_gib(44_023_414_784) == "41.0 GiB"


def test_plural() -> None:
    assert plural(1, "step") == "1 step"
    assert plural(1000, "step") == "1,000 steps"
    assert plural(2, "process", "processes") == "2 processes"


def test_differences_name_values_that_changed_appeared_or_went() -> None:
    before, now = {"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": "2", "new": 4}
    assert list(differences(before, now).values()) == [
        "b was 2 and is now '2'",
        "gone was 3 and is now None",
        "new was None and is now 4",
    ]


def test_flatten_yields_the_path_of_each_value() -> None:
    nested = {"train": {"seed": 0, "betas": [0.9]}, "empty": {}, "device": None}
    assert dict(flatten(nested)) == {
        ("train", "seed"): 0,
        ("train", "betas"): [0.9],
        ("device",): None,
    }
