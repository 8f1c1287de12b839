"""Curves in Vega-Lite, over steps, tokens or time: rows of data, and layers of marks."""

from collections.abc import Sequence
from typing import Any

from app.tools.report.curves import points_to_draw, smooth
from app.tools.report.run_data import Run

Spec = dict[str, Any]

# Labels of an axis, as Vega expressions.
SHORT = "replace(format(datum.value, '.3~s'), 'G', 'B')"
PLAIN = "format(datum.value, '.6~g')"

# About the width of a chart in pixels.
_BUCKETS = {"large": 400, "small": 160}
_HELD_OUT_POINTS = 200
# A legend of more runs gets columns of about this many pixels together, and is cut at the most.
_RUNS_IN_A_ROW, _LEGEND_WIDTH, _MOST_IN_LEGEND = 8, 460, 24
_IS_CURVE = [{"filter": "isValid(datum.smooth)"}]


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit for an axis of this length, and the seconds in the unit."""
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next((unit for unit in units if seconds >= 2 * unit[1]), ("seconds", 1.0))


def _largest(runs: Sequence[Run], column: str) -> float:
    return max(float(run.metrics[column][-1]) for run in runs)


def x_axes(runs: Sequence[Run]) -> dict[str, Spec]:
    """Return the encodings of x, by the name of the choice."""
    tokens, seconds = _largest(runs, "tokens"), _largest(runs, "seconds")
    unit, length = time_unit(seconds)

    def axis(field: str, title: str, last: float, labels: str) -> Spec:
        # The margin keeps the last point from being cut off.
        scale = {"domain": [0, 1.02 * last], "nice": False}
        encoding = {"field": field, "title": title, "axis": {"labelExpr": labels}}
        return encoding | {"type": "quantitative", "scale": scale}

    return {
        "step": axis("step", "steps", max(run.steps for run in runs), SHORT),
        "tokens": axis("tokens", "tokens", tokens, SHORT),
        "time": axis("time", unit, seconds / length, PLAIN),
    }


def curve_rows(
    runs: Sequence[Run], column: str, scale: float = 1.0, *, is_smoothed: bool = True
) -> list[Spec]:
    """Return a column as measured and, unless switched off, smoothed over 2 % of the run."""
    rows: list[Spec] = []
    for run in runs:
        values = run.metrics[column] * scale
        indices = points_to_draw(values, _BUCKETS["large" if column == "train_loss" else "small"])
        radius = max(len(values) // 100, min(2, len(values) // 10))
        smoothed = smooth(values, indices, radius if is_smoothed else 0)
        rows += [
            _row(run, int(i)) | {"raw": rounded(values[i]), "smooth": rounded(mean)}
            for i, mean in zip(indices, smoothed, strict=True)
        ]
    return rows


def held_out_rows(run: Run) -> list[Spec]:
    """Return the held-out losses of a run."""
    held_out = run.metrics["val_loss"]
    indices = points_to_draw(held_out, _HELD_OUT_POINTS)
    return [_row(run, int(i)) | {"held_out": rounded(held_out[i])} for i in indices]


def _row(run: Run, index: int) -> Spec:
    metrics = run.metrics
    return {
        "run": run.name,
        "step": int(metrics["step"][index]) + 1,
        "tokens": int(metrics["tokens"][index]),
        "seconds": round(float(metrics["seconds"][index]), 1),
    }


def rounded(value: float) -> float:
    """Return a number rounded to the digits that a picture can show."""
    return float(f"{value:.5g}")


def colored(names: Sequence[str], *, is_large: bool = True) -> Spec:
    """Return the encoding of a color per name, with a legend if there are several.

    Args:
        names: the names; of many only a large chart has a legend.
    """
    legend: Spec | None = {"title": None} if len(names) > 1 else None
    if legend and len(names) > _RUNS_IN_A_ROW:
        legend |= {
            "columns": max(1, _LEGEND_WIDTH // (30 + 7 * max(map(len, names)))),
            "symbolLimit": _MOST_IN_LEGEND,
            # In place of Vega's own words.
            "labelExpr": r"replace(datum.label, /^…(\d+) entries$/, 'and $1 more')",
        }
        legend = legend if is_large else None
    scale = {"domain": list(names)}
    return {"color": {"field": "run", "type": "nominal", "scale": scale, "legend": legend}}


def layered(
    runs: Sequence[Run],
    rows: list[Spec],
    shown: tuple[float, float],
    labels: str,
    color: Spec,
    more: list[Spec],
) -> Spec:
    """Return a chart: the curves of `rows`, the layers `more`, and the point nearest the mouse."""
    unit, seconds_per_unit = time_unit(_largest(runs, "seconds"))
    fields = (
        *(("step", "steps", ","), ("tokens", "tokens", ","), ("time", unit, ".3~f")),
        *(("raw", "measured", ".4~g"), ("smooth", "smoothed", ".4~g")),
        ("held_out", "held-out", ".5~g"),
    )
    tooltip: list[Spec] = [{"field": "run"}] if len(runs) > 1 else []
    tooltip += [
        {"field": field, "title": title, "type": "quantitative", "format": form}
        for field, title, form in fields
        if any(field in row for row in rows) or field == "time"
    ]
    few = sum("smooth" in row for row in rows) <= 50 * len(runs)
    curve = {"type": "line", "clip": True}
    thin = curve | {"strokeWidth": 1, "opacity": 0.35}
    thick = curve | {"strokeWidth": 2, "point": few and {"filled": True, "size": 25}}
    hover = {
        "transform": [
            {"calculate": "isValid(datum.smooth) ? datum.smooth : datum.held_out", "as": "shown"},
        ],
        "mark": {"type": "point", "filled": True, "size": 90, "clip": True},
        "params": [{"name": "near", "select": {
            "type": "point", "nearest": True, "on": "pointermove", "clear": "pointerout",
        }}],
        "encoding": {
            "y": {"field": "shown", "type": "quantitative"},
            "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
            "tooltip": tooltip,
        },
    }  # fmt: skip
    # Without the measured values of several runs, which would hide each other.
    curves = {"raw": thin, "smooth": thick} if len(runs) == 1 else {"smooth": thick}
    has_curves = any("smooth" in row for row in rows)
    layers = [
        {"transform": _IS_CURVE, "mark": mark, "encoding": {"y": {"field": field}}}
        for field, mark in curves.items()
        if has_curves
    ]
    return {
        "data": {"values": rows},
        "transform": [{"calculate": f"datum.seconds / {seconds_per_unit}", "as": "time"}],
        "encoding": {
            "x": x_axes(runs)["tokens"],
            "y": {
                "type": "quantitative", "axis": {"labelExpr": labels}, "title": None,
                "scale": {"domain": list(shown), "nice": False},
            },
            "detail": {"field": "run"},
            **color,
        },
        "layer": [*layers, *more, hover],
    }  # fmt: skip


def dots(*, are_many: bool, line: bool = False) -> Spec:
    """Return the layer of the held-out losses, as points or as a line with points."""
    dot = {"filled": True, "size": 20 if are_many else 55, "opacity": 1, "clip": True}
    mark = {"type": "line", "clip": True, "point": dot} if line else {"type": "point", **dot}
    return {
        "transform": [{"filter": "isValid(datum.held_out)"}],
        "mark": mark,
        "encoding": {"y": {"field": "held_out"}},
    }
