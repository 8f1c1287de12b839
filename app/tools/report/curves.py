"""Reduction of long curves to few points that look the same."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def finite(values: Floats) -> Floats:
    """Return the values that are neither NaN nor infinite."""
    return values[np.isfinite(values)]


def points_to_draw(values: Floats, buckets: int) -> Indices:
    """Return the indices of the points that a picture of the curve needs, ascending.

    These are the first, the last, and the lowest and highest of `buckets` parts of equal length, so
    that every spike is shown; or all points if there are few.

    Args:
        values: float64 [steps]; values that are not finite are left out.
    """
    (indices,) = np.isfinite(values).nonzero()
    if len(indices) <= 2 * buckets:
        return indices
    extremes = [
        part[[values[part].argmin(), values[part].argmax()]]
        for part in np.array_split(indices, buckets)
    ]
    return np.unique(np.concatenate([indices[:1], indices[-1:], *extremes]))


def smooth(values: Floats, centers: Indices, radius: int) -> Floats:
    """Return the interquartile mean, which ignores spikes, around each center.

    Windows narrow towards the start, where a steep descent would be shifted otherwise.

    Args:
        values: float64 [steps]; values that are not finite are left out.
        centers: int64 [points], steps.
        radius: steps on each side of a center.

    Returns:
        float64 [points]
    """
    windows = [
        np.sort(finite(values[i - min(i, radius) : i + min(i, radius) + 1])) for i in centers
    ]
    middles = [window[len(window) // 4 : len(window) - len(window) // 4] for window in windows]
    return np.array([middle.mean() if middle.size else np.nan for middle in middles])


def usual_range(values: Floats) -> Floats:
    """Return the range that a picture should show, float64 [2]; [0] if no value is finite.

    It leaves out spikes (0.2 % of the values on each side) and the steep descent in the first 2 %
    of the run.
    """
    usual = np.sort(finite(values[len(values) // 50 :]))
    outer = len(usual) // 500
    return usual[outer : len(usual) - outer][[0, -1]] if usual.size else usual


def with_margin(values: Floats) -> tuple[float, float]:
    """Return the limits of an axis that shows all values, with a margin."""
    values = finite(values)
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    margin = 0.07 * ((high - low) or abs(high) or 1.0)
    return float(low - (margin if low else 0.0)), float(high + margin)
