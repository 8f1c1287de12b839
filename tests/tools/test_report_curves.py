import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.tools.report.curves import points_to_draw, smooth, usual_range, with_margin


def smooth_all(values: list[float], reach: int) -> list[float]:
    return smooth(np.array(values), np.arange(len(values)), reach).tolist()


def test_smoothing_of_a_written_out_example() -> None:
    assert smooth_all([5, 1, 4], 0) == [5, 1, 4]
    # Windows [0], [0..2], [1..3], [2..3] of 1, 2, 6, 4: below four values nothing is left out.
    assert smooth_all([1, 2, 6, 4], 1) == [1, 3, 4, 5]
    # The middle window holds all five, of which the lowest and the highest are left out.
    assert smooth_all([1, 2, 900, 4, 3], 2)[2] == 3
    assert smooth(np.array([1.0, 2.0, 6.0, 4.0]), np.array([2]), 1).tolist() == [4]


def test_smoothing_keeps_straight_lines_and_ignores_spikes() -> None:
    line = np.linspace(11, 3, 500)
    inner = np.arange(490)
    assert np.allclose(smooth(line, inner, 10), line[:490])
    spiked = line.copy()
    spiked[[50, 250]] = 1e9
    assert np.allclose(smooth(spiked, inner, 10), line[:490], atol=0.02)


def test_smoothing_ignores_values_that_are_not_finite() -> None:
    nan = float("nan")
    assert smooth_all([1, nan, 3], 1) == [1, 2, 3]
    assert np.isnan(smooth_all([nan, nan], 1)).all()


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=300),
    st.integers(1, 40),
)
def test_few_points_keep_ends_and_extremes(values: list[float], buckets: int) -> None:
    curve = np.array(values)
    points = points_to_draw(curve, buckets)
    (known,) = np.isfinite(curve).nonzero()
    assert set(points) <= set(known)
    assert len(points) <= max(2 * buckets + 2, 2)
    assert (np.diff(points) > 0).all()
    if len(known):
        assert {known[0], known[-1]} <= set(points)
        assert curve[points].max() == curve[known].max()
        assert curve[points].min() == curve[known].min()


def test_short_curve_keeps_every_point() -> None:
    assert points_to_draw(np.arange(38.0), 400).tolist() == list(range(38))


def test_usual_range_leaves_out_the_start_and_spikes() -> None:
    values = np.concatenate([np.linspace(11, 4, 20), np.linspace(4, 3, 980)])
    values[500] = 1e6
    low, high = usual_range(values)
    assert (low, high) == pytest.approx((3, 4), abs=0.01)
    assert usual_range(np.array([np.nan])).size == 0


def test_axis_is_never_empty() -> None:
    for values in ([], [np.nan], [0.0], [3.0], [3.0, 4.0]):
        low, high = with_margin(np.array(values))
        assert low < high
