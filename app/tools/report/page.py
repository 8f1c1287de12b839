"""The page: one HTML file that needs no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from app.tools.report import facts
from app.tools.report.charts import Chart
from app.tools.report.curves import finite
from app.tools.report.layers import x_axes
from app.tools.report.pictures import THEMES, javascript
from app.tools.report.run_data import Run

_FOLDER = Path(__file__).parent
_MAX_SAMPLES = 100


@dataclass(frozen=True)
class Choice:
    """The runs that the live page offers and shows.

    Attributes:
        offered: names of all runs
        chosen: names of those to show, in the order in which they were chosen
        version: changes when the page would
    """

    offered: list[str]
    chosen: list[str]
    version: str


def page(
    runs: Sequence[Run],
    charts: Sequence[Chart],
    live: Choice | None = None,
    problems: Sequence[str] = (),
) -> str:
    """Return the report as HTML. All text of the runs, which may be anything, is escaped.

    Args:
        live: the choice, if a server shows the page; None: the page is a file.
        problems: why some of the chosen runs cannot be shown.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    template = environment.from_string(_read("page.html"))
    return template.render(
        title=facts.title(live.chosen if live else [run.name for run in runs])
        or "No run is chosen",
        live=live,
        problems=problems,
        runs=runs,
        charts=charts,
        sizes=_sizes(charts),
        descriptions={run.name: facts.describe(run) for run in runs},
        figures=facts.figures(runs[0]) if len(runs) == 1 else [],
        comparison=facts.comparison(runs) if len(runs) > 1 else [],
        times=facts.times(runs) if runs else [],
        tables=facts.tables(runs),
        samples={run.name: _samples(run) for run in runs if run.samples},
        data={
            "charts": {chart.key: {"spec": chart.spec, "fullY": chart.full_y} for chart in charts},
            "axes": x_axes(runs) if runs else {},
            "runs": [run.name for run in runs],
            "live": live and {"version": live.version, "chosen": live.chosen},
            "themes": THEMES,
        },
        css=Markup(_read("page.css")),
        script=Markup(_read("page.js")),
        vega=Markup(javascript()),
    )


def _sizes(charts: Sequence[Chart]) -> dict[str, str]:
    """Return the width of each chart, such that every row of the page is full."""
    small = [chart.key for chart in charts if not chart.is_large]
    halves = {0: 0, 1: 4, 2: 2}[len(small) % 3]
    sizes = {chart.key: "large" for chart in charts}
    for place, key in enumerate(small):
        sizes[key] = "third" if place < len(small) - halves else "half"
    return sizes


def _samples(run: Run) -> list[dict[str, Any]]:
    """Return the first, the last and evenly spaced samples between, with the loss at each step."""
    count = len(run.samples)
    places = np.unique(np.linspace(0, count - 1, min(count, _MAX_SAMPLES)).round().astype(int))
    return [
        {"step": step, "texts": texts, "loss": _loss_after(run, step)}
        for step, texts in (run.samples[place] for place in places)
    ]


def _loss_after(run: Run, step: int) -> str:
    """Return the held-out loss after `step` steps; if it was not measured, the training loss."""
    for column, name in (("val_loss", "held-out loss"), ("train_loss", "training loss")):
        measured = finite(run.metrics[column][run.metrics["step"] == step - 1])
        if measured.size:
            return f"{name} {measured[0]:.3f}"
    return ""


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
