"""PNGs of the charts, without a browser."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import vl_convert

from app.tools.report.charts import Chart
from app.tools.report.facts import Figure, describe, title
from app.tools.report.layers import Spec
from app.tools.report.run_data import Run

VEGA_LITE = "6.4"
_SCALE = 1.5
_WIDTH = 1080
_GAP = 24
# Labels of an axis, and a gap.
_PADDING = 40 + _GAP

# Okabe and Ito's colors suit every kind of color vision (https://jfly.uni-koeln.de/color/).
THEMES: dict[str, dict[str, Any]] = {
    name: {
        "background": paper,
        "font": "system-ui, 'Liberation Sans', Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "domainColor": rule, "grid": True, "gridColor": grid, "labelColor": gray,
            "labelFontSize": 11, "labelPadding": 6, "tickColor": rule, "tickSize": 0,
            "titleColor": gray, "titleFontSize": 11, "titleFontWeight": "normal",
            "titleAnchor": "end", "labelOverlap": True,
        },
        "axisX": {"grid": False, "tickCount": 6},
        "axisY": {"domain": False, "tickCount": 5, "minExtent": 40, "maxExtent": 200},
        "legend": {
            "orient": "top", "labelColor": ink, "labelFontSize": 12, "symbolType": "stroke",
            "symbolStrokeWidth": 3, "symbolOpacity": 1, "labelLimit": 400, "offset": 4,
        },
        "range": {"category": colors},
        "rule": {"color": gray},
        "text": {"color": ink},
        "title": {
            "anchor": "start", "color": ink, "fontSize": 14, "subtitleColor": gray,
            "subtitleFontSize": 12, "offset": 10,
        },
    }
    for name, paper, ink, gray, rule, grid, colors in (
        ("light", "#ffffff", "#1b2430", "#6b7480", "#b4bcc6", "#e9ecf0",
         ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#1b2430"]),
        ("dark", "#161b22", "#e6edf3", "#94a0ad", "#48525e", "#252c35",
         ["#58a6dd", "#ff8b47", "#3fcf9f", "#e8a3cb", "#f5bd3d", "#9fd8f7", "#c99b78", "#e6edf3"]),
    )
}  # fmt: skip


def picture(chart: Chart, theme: str = "light") -> bytes:
    """Return a chart as a PNG."""
    heading = {"text": chart.title, "subtitle": chart.unit}
    sized = _sized(chart, _WIDTH, {"step": 34} if chart.key == "time" else 420)
    return _png(sized | {"title": heading}, theme)


def overview(runs: Sequence[Run], figures: Sequence[Figure], charts: Sequence[Chart]) -> bytes:
    """Return a PNG of the key figures, the losses, and the charts that explain them."""
    by_key = {chart.key: chart for chart in charts}
    color = {"scale": {"color": "independent"}}
    rows: list[Spec] = [_figures(figures)] if len(runs) == 1 else []
    for height, *keys in (
        (340, "held_out_loss", "loss"),
        (130, "learning_rate", "grad_norm", "throughput", "hellaswag"),
    ):
        if side_by_side := [by_key[key] for key in keys if key in by_key]:
            width = _WIDTH / len(side_by_side) - _PADDING
            titled = [_titled(chart, width, height) for chart in side_by_side]
            rows.append({"hconcat": titled, "spacing": _GAP, "resolve": color})
    if "time" in by_key:
        rows.append(_titled(by_key["time"], _WIDTH - _PADDING, 26 * len(runs)))
    name = title([run.name for run in runs])
    return _png({
        "title": {
            "text": name, "subtitle": [*dict.fromkeys(map(describe, runs))], "fontSize": 22,
            "subtitleFontSize": 13, "offset": 18, "limit": _WIDTH,
        },
        "vconcat": rows,
        "spacing": 22,
        "padding": 32,
        "resolve": color,
    })  # fmt: skip


def _figures(figures: Sequence[Figure]) -> Spec:
    """Return a row of the key figures."""
    rows = [
        {"x": i, "value": figure.value, "name": figure.name} for i, figure in enumerate(figures)
    ]
    text = {"type": "text", "align": "left", "baseline": "bottom"}
    x = {"field": "x", "type": "ordinal", "axis": None}
    return {
        "data": {"values": rows}, "width": _WIDTH - _PADDING, "height": 44,
        "encoding": {"x": x | {"scale": {"align": 0, "paddingInner": 0, "paddingOuter": 0}}},
        "layer": [
            {"mark": text | {"fontSize": 17, "fontWeight": "bold", "y": 22, "dx": -40},
             "encoding": {"text": {"field": "value"}}},
            {"mark": text | {"fontSize": 11, "opacity": 0.65, "y": 40, "dx": -40},
             "encoding": {"text": {"field": "name"}}},
        ],
    }  # fmt: skip


def _titled(chart: Chart, width: float, height: int) -> Spec:
    # An empty subtitle keeps the charts of a row equally high.
    heading = {"text": chart.title, "subtitle": chart.unit or " ", "offset": 6}
    return _sized(chart, width, height) | {"title": heading}


def _sized(chart: Chart, width: float, height: int | Spec) -> Spec:
    # A picture needs no interaction, and names of parameters must be unique in it.
    layers = [layer for layer in chart.spec.get("layer", []) if "params" not in layer]
    static = chart.spec | ({"layer": layers} if layers else {})
    return static | {"width": width, "height": height}


def _png(spec: Spec, theme: str = "light") -> bytes:
    themed = json.dumps({"padding": 24, **spec, "config": THEMES[theme]}, ensure_ascii=False)
    # A name that is not UTF-8 has surrogates, which vl_convert refuses.
    themed = themed.encode(errors="replace").decode()
    return vl_convert.vegalite_to_png(themed, vl_version=VEGA_LITE, scale=_SCALE)


@cache
def javascript() -> str:
    """Return the source of Vega, Vega-Lite and Vega-Embed, which defines `vegaEmbed`."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
