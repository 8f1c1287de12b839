"""Curves over a choice of x in Vega-Lite: rows of data and the marks that show them."""

from collections.abc import Sequence
from typing import Any

from app.tools.report.curves import points_to_draw, smooth
from app.tools.report.run_data import Run

Spec = dict[str, Any]

# Formats of the numbers beside an axis: expressions of Vega.
SHORT = "replace(format(datum.value, '.3~s'), 'G', 'B')"
PLAIN = "format(datum.value, '.6~g')"

# A picture has not many more pixels from left to right.
_BUCKETS = {"large": 400, "small": 160}
_HELD_OUT_POINTS = 200
_IS_CURVE = [{"filter": "isValid(datum.smooth)"}]


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit for an axis of so many seconds, and its length in seconds."""
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next((unit for unit in units if seconds >= 2 * unit[1]), ("seconds", 1.0))


def _last(runs: Sequence[Run], column: str) -> float:
    return max(float(run.metrics[column][-1]) for run in runs)


def _time_unit(runs: Sequence[Run]) -> tuple[str, float]:
    return time_unit(_last(runs, "seconds"))


def x_axes(runs: Sequence[Run]) -> dict[str, Spec]:
    """Encodings of x to choose from."""
    unit, length = _time_unit(runs)

    def axis(field: str, title: str, last: float, labels: str) -> Spec:
        # The last point gets some room.
        scale = {"domain": [0, 1.01 * last], "nice": False}
        words = {"field": field, "title": title, "axis": {"labelExpr": labels}}
        return words | {"type": "quantitative", "scale": scale}

    last = {name: _last(runs, name) for name in ("tokens", "seconds")}
    return {
        "step": axis("step", "steps", max(run.steps for run in runs), SHORT),
        "tokens": axis("tokens", "tokens", last["tokens"], SHORT),
        "time": axis("time", unit, last["seconds"] / length, PLAIN),
    }


def curve_rows(
    runs: Sequence[Run], column: str, scale: float = 1.0, *, is_smoothed: bool = True
) -> list[Spec]:
    """Return a column as measured, and smoothed over a fiftieth of each run."""
    rows = []
    for run in runs:
        values = run.metrics[column] * scale
        places = points_to_draw(values, _BUCKETS["large" if column == "train_loss" else "small"])
        reach = max(len(values) // 100, min(2, len(values) // 10))
        smoothed = smooth(values, places, reach if is_smoothed else 0)
        for place, mean in zip(places, smoothed, strict=True):
            rows.append(
                _row(run, int(place)) | {"raw": short(values[place]), "smooth": short(mean)}
            )
    return rows


def held_out_rows(run: Run) -> list[Spec]:
    """The held-out losses."""
    held_out = run.metrics["val_loss"]
    places = points_to_draw(held_out, _HELD_OUT_POINTS)
    return [_row(run, int(place)) | {"held_out": short(held_out[place])} for place in places]


def _row(run: Run, place: int) -> Spec:
    metrics = run.metrics
    return {
        "run": run.name,
        "step": int(metrics["step"][place]) + 1,
        "tokens": int(metrics["tokens"][place]),
        "seconds": round(float(metrics["seconds"][place]), 1),
    }


def short(value: float) -> float:
    """With as many digits as a picture shows."""
    return float(f"{value:.5g}")


def colored(names: Sequence[str]) -> Spec:
    """A colour of the theme for each name, told in a legend."""
    legend = {"title": None} if len(names) > 1 else None
    scale = {"domain": list(names)}
    return {"color": {"field": "run", "type": "nominal", "scale": scale, "legend": legend}}


def colored_by_run(runs: Sequence[Run]) -> Spec:
    """A colour for each run."""
    return colored([run.name for run in runs])


def layered(
    runs: Sequence[Run],
    rows: list[Spec],
    shown: tuple[float, float],
    labels: str,
    color: Spec,
    more: list[Spec],
) -> Spec:
    """Curves thin and smoothed, what else there is, and the point next to the mouse."""
    name, seconds = _time_unit(runs)
    told = (
        *(("step", "steps", ","), ("tokens", "tokens", ","), ("time", name, ".3~f")),
        *(("raw", "measured", ".4~g"), ("smooth", "smoothed", ".4~g")),
        ("held_out", "held-out", ".5~g"),
    )
    tooltip: list[Spec] = [{"field": "run"}] if len(runs) > 1 else []
    tooltip += [
        {"field": field, "title": title, "type": "quantitative", "format": form}
        for field, title, form in told
        if any(field in row for row in rows) or field == "time"
    ]
    few = all(len(run.metrics["step"]) <= 50 for run in runs)
    curve = {"type": "line", "clip": True}
    thin = curve | {"strokeWidth": 1, "opacity": 0.35}
    thick = curve | {"strokeWidth": 2, "point": few and {"filled": True, "size": 25}}
    hover = {
        "transform": [
            {"calculate": "isValid(datum.smooth) ? datum.smooth : datum.held_out", "as": "at"},
        ],
        "mark": {"type": "point", "filled": True, "size": 90, "clip": True},
        "params": [{"name": "near", "select": {
            "type": "point", "nearest": True, "on": "pointermove", "clear": "pointerout",
        }}],
        "encoding": {
            "y": {"field": "at", "type": "quantitative"},
            "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
            "tooltip": tooltip,
            **color,
        },
    }  # fmt: skip
    y = {
        "axis": {"labelExpr": labels},
        "title": None,
        "scale": {"domain": list(shown), "nice": False},
    }
    # The measured values of several runs would hide each other.
    curves = {"raw": thin, "smooth": thick} if len(runs) == 1 else {"smooth": thick}
    are_there = any("smooth" in row for row in rows)
    layers = [_curve(field, mark, color) for field, mark in curves.items() if are_there]
    return {
        "data": {"values": rows},
        "transform": [{"calculate": f"datum.seconds / {seconds}", "as": "time"}],
        "encoding": {
            "x": x_axes(runs)["tokens"],
            "y": {"type": "quantitative", **y},
            "detail": {"field": "run"},
        },
        "layer": [*layers, *more, hover],
    }


def _curve(field: str, mark: Spec, color: Spec) -> Spec:
    return {"transform": _IS_CURVE, "mark": mark, "encoding": {"y": {"field": field}, **color}}


def dots(color: Spec, *, are_many: bool, line: bool = False) -> Spec:
    """The marks of held-out losses."""
    dot = {"filled": True, "size": 20 if are_many else 55, "opacity": 1, "clip": True}
    mark = {"type": "line", "clip": True, "point": dot} if line else {"type": "point", **dot}
    return {
        "transform": [{"filter": "isValid(datum.held_out)"}],
        "mark": mark,
        "encoding": {"y": {"field": "held_out"}, **color},
    }
