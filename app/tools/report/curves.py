"""Curves of any length as few points that look the same."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def finite(values: Floats) -> Floats:
    """Those that are neither NaN nor infinite."""
    return values[np.isfinite(values)]


def points_to_draw(values: Floats, buckets: int) -> Indices:
    """Indices of what a picture of the curve needs, in order.

    values: float64 [steps]; all finite ones if they are few, else the first, the last, and the
    lowest and the highest of each of `buckets` stretches of equal length: no spike is lost.
    """
    (known,) = np.isfinite(values).nonzero()
    if len(known) <= 2 * buckets:
        return known
    stretches = np.array_split(known, buckets)
    ends = [known[:1], known[-1:]]
    extremes = [
        stretch[[values[stretch].argmin(), values[stretch].argmax()]] for stretch in stretches
    ]
    return np.unique(np.concatenate(ends + extremes))


def smooth(values: Floats, centres: Indices, reach: int) -> Floats:
    """Interquartile mean, blind to spikes, over `reach` steps to both sides of each centre.

    values: float64 [steps], of which only the finite count; centres: int64 [points], indices of
    steps; returns float64 [points]. Windows narrow towards the start: its steep descent stays put.
    """
    windows = [np.sort(finite(values[i - min(i, reach) : i + min(i, reach) + 1])) for i in centres]
    middles = [window[len(window) // 4 : len(window) - len(window) // 4] for window in windows]
    return np.array([middle.mean() if middle.size else np.nan for middle in middles])


def usual_range(values: Floats) -> Floats:
    """Return the range that a picture should show, or an empty one if nothing is finite.

    Left out are spikes, two in a thousand to both sides, and what only the first fiftieth of a
    run reaches, whose descent is steep and known.
    """
    usual = np.sort(finite(values[len(values) // 50 :]))
    outer = len(usual) // 500
    return usual[outer : len(usual) - outer][[0, -1]] if usual.size else usual


def with_margin(values: Floats, *, from_zero: bool = False) -> tuple[float, float]:
    """An axis that holds all values, with some room."""
    known = finite(values)
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    room = 0.07 * ((high - low) or abs(high) or 1.0)
    return float(low - (room if low else 0.0)), float(high + room)
