"""The picture of a sweep: held-out losses over a swept value, with the spread over seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from app.tools.report.charts import Chart
from app.tools.report.curves import with_margin
from app.tools.report.layers import PLAIN, Spec, colored, rounded
from app.tools.sweep.plan import SEED, label
from app.tools.sweep.results import Combination

_DECADE = 10


def sweep_chart(found: Sequence[Combination]) -> Chart:
    """Return the chart of runs, as points, and of the mean and spread of each combination.

    The first swept setting is on the x axis; each combination of the others has a color.
    """
    name = next(iter(found[0].values), SEED)
    points: list[Spec] = []
    means: list[Spec] = []
    for it in found:
        others = {"run": label({key: value for key, value in it.values.items() if key != name})}
        for result in it.results:
            x = {"x": result.values.get(name), **others}
            points.append(x | {"loss": result.held_out_loss})
        if it.mean is not None and name != SEED:
            spread = it.spread or 0.0
            means.append({
                "x": it.values[name], **others, "mean": rounded(it.mean),
                "low": it.mean - spread, "high": it.mean + spread,
            })  # fmt: skip
    losses = [row["loss"] for row in points if row["loss"] is not None]
    ends = [row[end] for row in means for end in ("low", "high")]
    x_axis = _x_axis(name, [row["x"] for row in points])
    mean = {"type": "point", "filled": True, "size": 90, "opacity": 1}
    if x_axis["type"] == "quantitative":
        mean = {"type": "line", "strokeWidth": 2, "point": mean}
    color = colored([*dict.fromkeys(row["run"] for row in points)])
    y = {"type": "quantitative", "title": None}
    axis = {"axis": {"labelExpr": PLAIN}, "scale": {"zero": False}}
    shown = {"scale": {"domain": with_margin(np.array(losses + ends)), "nice": False}}
    spec: Spec = {
        "encoding": {"x": x_axis},
        "layer": [
            {"data": {"values": means}, "mark": {"type": "rule", "strokeWidth": 2},
             "encoding": {"y": y | axis | shown | {"field": "low"}, "y2": {"field": "high"},
                          **color}},
            {"data": {"values": means}, "mark": mean,
             "encoding": {"y": y | {"field": "mean"}, **color}},
            {"data": {"values": [row for row in points if row["loss"] is not None]},
             "mark": {"type": "point", "size": 45},
             "encoding": {"y": y | axis | shown | {"field": "loss"}, **color}},
            {"data": {"values": [row for row in points if row["loss"] is None]},
             "mark": {"type": "text", "text": "diverged", "baseline": "top"},
             "encoding": {"y": {"value": 4}}},
        ],
    }  # fmt: skip
    return Chart(
        "sweep", "Held-out loss", "nats per token: each run, and mean ± standard deviation", spec
    )


def _x_axis(name: str, values: Sequence[Any]) -> Spec:
    """Return the encoding of x: logarithmic if the values span more than a decade."""
    title = {"field": "x", "title": name.partition(".")[2]}
    numbers = [it for it in values if isinstance(it, int | float) and not isinstance(it, bool)]
    if len(numbers) < len(values):
        kept = {"sort": [*dict.fromkeys(values)], "axis": {"labelAngle": 0}}
        return title | {"type": "ordinal"} | kept
    is_log = min(numbers) > 0 and max(numbers) > _DECADE * min(numbers)
    scale = {"type": "log"} if is_log else {"zero": False}
    scale |= {"nice": False, "padding": 40}
    axis = {"values": sorted(set(numbers)), "labelExpr": PLAIN}
    return title | {"type": "quantitative", "scale": scale, "axis": axis}
