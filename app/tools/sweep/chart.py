"""The picture of a sweep: held-out losses over a swept value, with the spread over seeds."""

from collections.abc import Sequence
from typing import Any

from app.tools.report.charts import Chart
from app.tools.report.layers import PLAIN, Spec, colored
from app.tools.sweep.plan import SEED, label
from app.tools.sweep.results import Result

_DECADE = 10
_ABOUT = "nats per token: each run, and mean ± standard deviation"


def sweep_chart(results: Sequence[Result]) -> Chart:
    """Return the chart of runs, as points, and of the mean and spread over their seeds.

    The first swept setting is on the x axis; each combination of the others has a color.
    """
    name = next((it for it in results[0].values if it != SEED), SEED)
    x_axis = _x_axis(name, [it.values[name] for it in results])
    is_curve = x_axis["type"] == "quantitative"
    rows: list[Spec] = [
        {
            "x": it.values[name] if is_curve else str(it.values[name]),
            "run": label({key: it.values[key] for key in it.values if key not in (name, SEED)}),
            "loss": it.held_out_loss,
        }
        for it in results
    ]
    dot = {"type": "point", "filled": True, "size": 90, "opacity": 1}
    mean = {"type": "line", "strokeWidth": 2, "point": dot} if is_curve else dot
    loss = {
        "field": "loss", "type": "quantitative", "title": None, "axis": {"labelExpr": PLAIN},
        "scale": {"zero": False, "padding": 20},
    }  # fmt: skip
    color = colored([*dict.fromkeys(row["run"] for row in rows)])
    spread = {"type": "errorbar", "extent": "stdev", "rule": {"strokeWidth": 2}}
    trained = [{"filter": "isValid(datum.loss)"}]
    text = {"type": "text", "text": "diverged", "baseline": "top"}
    spec: Spec = {
        "data": {"values": rows},
        "encoding": {"x": x_axis, **color},
        "layer": [
            {"transform": trained, "mark": spread, "encoding": {"y": loss}},
            {"transform": trained, "mark": mean, "encoding": {"y": loss | {"aggregate": "mean"}}},
            {"transform": trained, "mark": {"type": "point", "size": 45}, "encoding": {"y": loss}},
            {"transform": [{"filter": "!isValid(datum.loss)"}], "mark": text,
             "encoding": {"y": {"value": 4}}},
        ],
    }  # fmt: skip
    return Chart("sweep", "Held-out loss", _ABOUT, spec)


def _x_axis(name: str, values: Sequence[Any]) -> Spec:
    """Return the encoding of x: logarithmic if the values span a decade."""
    title = {"field": "x", "title": name}
    numbers = [it for it in values if isinstance(it, int | float) and not isinstance(it, bool)]
    if name == SEED or len(numbers) < len(values):
        kept = {"sort": [*dict.fromkeys(map(str, values))], "axis": {"labelAngle": 0}}
        return title | {"type": "ordinal"} | kept
    # 3e-4 is less than 10 * 3e-5 in floating point.
    is_log = min(numbers) > 0 and max(numbers) > 0.999 * _DECADE * min(numbers)
    scale = {"type": "log" if is_log else "linear", "zero": False, "nice": False, "padding": 40}
    axis = {"values": sorted(set(numbers)), "labelExpr": PLAIN}
    return title | {"type": "quantitative", "scale": scale, "axis": axis}
