"""The charts of a report in Vega-Lite (https://vega.github.io/vega-lite/docs/)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from app.tools.report.curves import Floats, finite, usual_range, with_margin
from app.tools.report.layers import (
    PLAIN,
    SHORT,
    Spec,
    colored,
    curve_rows,
    dots,
    held_out_rows,
    layered,
    rounded,
    time_unit,
)
from app.tools.report.run_data import Run

# One of four endings is right.
_CHANCE = 0.25
_RATE = "datum.value == 0 ? '0' : format(datum.value, '.2~e')"
_SERIES = "isValid(datum.smooth) ? 'training' : 'held-out'"


@dataclass(frozen=True)
class Chart:
    """A chart and how the page shows it.

    Attributes:
        key: names its picture, and its element in the page
        spec: Vega-Lite, without width, height and title
        full_y: range of all values, spikes and first steps included; None if the page offers no
            full-range view
        is_large: True if it is as wide as the page
    """

    key: str
    title: str
    unit: str
    spec: Spec
    full_y: tuple[float, float] | None = None
    is_large: bool = False


@dataclass(frozen=True)
class _Curve:
    """A column of the metrics, and how its chart shows it."""

    key: str
    title: str
    unit: str
    column: str
    labels: str
    scale: float = 1.0
    is_smoothed: bool = True
    # Values that the axis shows as well; by default 0.
    beside: Callable[[Floats], Floats] = lambda _: np.zeros(1)


_TRAIN_LOSS = _Curve(
    *("loss", "Training loss", "nats per token", "train_loss", PLAIN),
    beside=lambda _: np.empty(0),
)
_CURVES = (
    _Curve("learning_rate", "Learning rate", "", "lr", _RATE, is_smoothed=False),
    _Curve("grad_norm", "Gradient norm", "before clipping", "grad_norm", PLAIN),
    _Curve(
        *("throughput", "Throughput", "tokens/s", "tokens_per_second", SHORT),
        # 10 % around the median, so that ordinary jitter does not look like trouble.
        beside=lambda values: np.array([0.9, 1.1]) * np.median(values),
    ),
    _Curve("mfu", "MFU", "of the data sheet's FLOP/s", "mfu", "format(datum.value, '.0%')"),
    _Curve(
        *("memory", "Memory", "peak so far, GiB", "memory_bytes", PLAIN, 1 / 2**30),
        is_smoothed=False,
    ),
    _Curve(
        *("hellaswag", "HellaSwag", "acc_norm", "hellaswag", "format(datum.value, '.1%')"),
        is_smoothed=False,
        beside=lambda _: np.array([_CHANCE]),
    ),
)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return every chart for which something was measured."""
    losses = [_loss(runs[0])] if len(runs) == 1 else _losses(runs)
    curves = [_curve(runs, curve) for curve in _CURVES]
    return [*filter(None, [*losses, *curves, _times(runs)])]


def _loss(run: Run) -> Chart | None:
    """Return the chart of one run's training and held-out loss."""
    train, held_out = run.metrics["train_loss"], run.metrics["val_loss"]
    if not finite(train).size:
        return None
    rows = curve_rows([run], "train_loss") + held_out_rows(run)
    names = ["training", *(["held-out"] if finite(held_out).size else [])]
    usual = with_margin(np.concatenate([usual_range(train), finite(held_out)[-1:]]))
    everything = with_margin(np.concatenate([finite(train), finite(held_out)]))
    color = colored(names)
    marks = dots(are_many=finite(held_out).size > 40)
    spec = layered([run], rows, usual, PLAIN, color, [marks] if len(names) > 1 else [])
    spec["transform"] += [{"calculate": _SERIES, "as": "run"}]
    return Chart("loss", "Loss", "nats per token", spec, everything, is_large=True)


def _losses(runs: Sequence[Run]) -> list[Chart | None]:
    """Return the charts of several runs' held-out and training losses."""
    train = _curve(runs, _TRAIN_LOSS)
    rows = [row for run in runs for row in held_out_rows(run)]
    if not rows:
        return [train]
    losses = np.array([row["held_out"] for row in rows])
    last = np.array([finite(run.metrics["val_loss"])[-1:].max(initial=-np.inf) for run in runs])
    # Without the highest tenth: a first value far above the others would squeeze them.
    shown = with_margin(np.append(np.sort(losses)[: -(len(losses) // 10) or None], finite(last)))
    color = colored([run.name for run in runs])
    marks = dots(are_many=len(rows) > 40 * len(runs), line=True)
    spec = layered(runs, rows, shown, PLAIN, color, [marks])
    full = with_margin(losses)
    return [
        Chart("held_out_loss", "Held-out loss", "nats per token", spec, full, is_large=True),
        train,
    ]


def _curve(runs: Sequence[Run], curve: _Curve) -> Chart | None:
    rows = curve_rows(runs, curve.column, curve.scale, is_smoothed=curve.is_smoothed)
    if not rows:
        return None
    # Step 0 includes the compilation: it counts only if there is no other.
    values = [run.metrics[curve.column] * curve.scale for run in runs]
    if curve.key in ("throughput", "mfu"):
        values = [column[len(column) > 1 :] for column in values]
    usual = [usual_range(column) for column in values]
    measured = [finite(column) for column in values if finite(column).size]
    beside = [curve.beside(column) for column in measured]
    shown = with_margin(np.concatenate(usual + beside))
    is_loss = curve is _TRAIN_LOSS
    color = colored([run.name for run in runs], is_large=is_loss)
    spec = layered(runs, rows, shown, curve.labels, color, [])
    full = with_margin(np.concatenate(measured)) if is_loss else None
    return Chart(curve.key, curve.title, curve.unit, spec, full, is_large=is_loss)


def _times(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of where the time went: a bar for each run."""
    times = [run.times() for run in runs]
    unit, length = time_unit(max(sum(time.values()) for time in times))
    kinds = [kind for kind in times[0] if any(time[kind] > 0 for time in times)]
    rows = [
        {"run": run.name, "kind": kind, "spent": rounded(time[kind] / length), "order": i,
         "part": f"{time[kind] / sum(time.values()):.1%}"}
        for run, time in zip(runs, times, strict=True)
        for i, kind in enumerate(kinds)
        if time[kind] > 0
    ]  # fmt: skip
    names = [run.name for run in runs]
    spec = {
        "data": {"values": rows},
        "mark": {"type": "bar", "height": 26},
        "encoding": {
            "x": {"field": "spent", "type": "quantitative", "title": unit, "stack": True},
            "y": {"field": "run", "type": "nominal", "title": None, "sort": names,
                  "axis": {"labels": len(runs) > 1, "grid": False}},
            "order": {"field": "order"},
            "color": {
                "field": "kind", "type": "nominal", "scale": {"domain": [*times[0]]},
                "legend": {"title": None, "symbolType": "square", "values": kinds},
            },
            "tooltip": [
                {"field": "run"}, {"field": "kind"},
                {"field": "spent", "title": unit}, {"field": "part"},
            ],
        },
    }  # fmt: skip
    return Chart("time", "Where the time went", "", spec, is_large=True) if rows else None
