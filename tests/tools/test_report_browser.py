"""The page of a report in a real Chromium, from its file, without any network."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from app.tools.report.charts import charts
from app.tools.report.page import page
from app.tools.report.run_data import read_run
from tests.tools.browser import chromium
from tests.tools.run_folders import make_run, rows

pytestmark = pytest.mark.browser

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def complaints() -> list[str]:
    """Messages of the browser's console, and requests to a network."""
    return []


@pytest.fixture
def opened(browser: Browser, tmp_path: Path, complaints: list[str]) -> Iterator[Open]:
    """Open the report of run folders: opened(folder, ..., scheme="dark", width=390)."""
    contexts = []

    def open_report(*folders: Path, scheme: str = "light", width: int = 1280) -> Page:
        runs = [read_run(folder) for folder in folders]
        path = tmp_path / "report.html"
        path.write_text(page(runs, charts(runs)), encoding="utf-8")
        context = browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            viewport={"width": width, "height": 900},
            offline=True,
        )
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else complaints.append(request.url)
            ),
        )
        shown.goto(path.as_uri())
        shown.wait_for_selector("body[data-drawn]")
        return shown

    yield open_report
    for context in contexts:
        context.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    samples = {step: [f"after {step}", "東京 <b>🙂</b>"] for step in (10, 20, 38)}
    return make_run(tmp_path / "muon", rows(38, 10), samples=samples)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    samples = {20: ["a line without a break " + "x" * 500]}
    return make_run(tmp_path / "adamw", rows(20, 10, lowest=3.5), samples=samples)


def count_colors(shown: Page, chart: str) -> int:
    """Colors of a chart's pixels: of an empty one there is one."""
    return int(
        shown.locator(f"#chart-{chart} canvas").evaluate(
            """canvas => {
                const {width, height} = canvas;
                const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
                return new Set(new Uint32Array(data.buffer)).size;
            }"""
        )
    )


def picture(shown: Page, chart: str = "loss") -> bytes:
    return shown.locator(f"#chart-{chart} canvas").screenshot()


def choose(shown: Page, choice: str, value: str) -> None:
    shown.click(f"[data-choice={choice}] button[value={value}]")
    shown.wait_for_selector(f'body[data-drawn*=\'"{choice}":"{value}"\']')


CHARTS = ("loss", "learning_rate", "grad_norm", "throughput", "memory", "time")


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_every_chart_is_drawn_without_network_and_console_messages(
    opened: Open, run: Path, complaints: list[str], scheme: str
) -> None:
    shown = opened(run, scheme=scheme)
    assert shown.locator("canvas").count() == len(CHARTS)
    for chart in CHARTS:
        assert count_colors(shown, chart) > 10, chart
    assert complaints == []


def test_theme_is_the_systems_until_one_is_selected(opened: Open, run: Path) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        shown = opened(run, scheme=scheme)
        background = "getComputedStyle(document.body).backgroundColor"
        backgrounds[scheme] = shown.evaluate(background), picture(shown)
        choose(shown, "theme", "dark" if scheme == "light" else "light")
        backgrounds[f"not {scheme}"] = shown.evaluate(background), picture(shown)
    assert backgrounds["light"] == backgrounds["not dark"]
    assert backgrounds["dark"] == backgrounds["not light"]
    assert len({color for color, _ in backgrounds.values()}) == 2


def test_a_long_legend_is_not_cut_on_a_phone(opened: Open, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-with-a-long-name-{n}", rows(30)) for n in range(9)]
    with Image.open(BytesIO(picture(opened(*runs, width=390)))) as image:
        edge = image.convert("RGB").crop((image.width - 1, 0, image.width, image.height // 2))
    assert len(edge.getcolors() or ()) == 1


def test_x_axis_can_be_steps_tokens_or_time(opened: Open, run: Path, complaints: list[str]) -> None:
    shown = opened(run)
    bar = picture(shown, "time")
    pictures = {}
    for value in ("step", "time", "tokens"):
        choose(shown, "x", value)
        assert shown.locator("[data-choice=x] [aria-pressed=true]").get_attribute("value") == value
        pictures[value] = picture(shown), picture(shown, "grad_norm")
        assert picture(shown, "time") == bar
    assert len(set(pictures.values())) == 3
    assert complaints == []


def test_loss_axis_can_be_usual_full_or_logarithmic(
    opened: Open, tmp_path: Path, complaints: list[str]
) -> None:
    run, other = (make_run(tmp_path / str(steps), rows(steps)) for steps in (150, 200))
    for folders in ((run,), (run, other)):
        shown = opened(*folders)
        pictures = set()
        for value in ("full", "log", "usual"):
            choose(shown, "y", value)
            pictures.add(picture(shown))
        assert len(pictures) == 3
    assert complaints == []


def test_tooltip_shows_the_nearest_point(opened: Open, run: Path) -> None:
    shown = opened(run)
    assert shown.locator("#tip").is_hidden()
    shown.locator("#chart-loss canvas").hover()
    shown.wait_for_selector("#tip:not([hidden])")
    tooltip = shown.locator("#tip").inner_text()
    assert "tokens" in tooltip
    assert "smoothed" in tooltip or "held-out" in tooltip
    shown.mouse.move(2, 2)
    shown.wait_for_selector("#tip", state="hidden")


def test_slider_selects_the_samples(opened: Open, run: Path) -> None:
    shown = opened(run)
    articles = shown.locator(".samples article")
    assert articles.count() == 3
    for at, step in ((0, 10), (1, 20), (2, 38)):
        shown.locator(".samples input").fill(str(at))
        assert shown.locator(".samples article:visible").count() == 1
        assert articles.nth(at).locator("pre").first.inner_text() == f"after {step}"
    assert articles.nth(2).locator("pre").last.inner_text() == "東京 <b>🙂</b>"


def test_runs_are_overlaid_and_can_be_hidden(
    opened: Open, run: Path, other: Path, complaints: list[str]
) -> None:
    shown = opened(run, other)
    assert shown.locator("canvas").count() == len(CHARTS) + 1
    both = picture(shown, "held_out_loss")
    shown.locator(".runs input").last.uncheck()
    shown.wait_for_selector('body[data-drawn*=\'"hidden":["adamw"]\']')
    assert picture(shown, "held_out_loss") != both
    shown.locator(".runs input").last.check()
    shown.wait_for_selector("body[data-drawn*='\"hidden\":[]']")
    assert picture(shown, "held_out_loss") == both
    assert complaints == []


@pytest.mark.parametrize("count", (1, 2))
def test_page_fits_the_width_of_a_phone(
    opened: Open, run: Path, other: Path, complaints: list[str], count: int
) -> None:
    shown = opened(*(run, other)[:count], width=390)
    shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    for chart in CHARTS:
        box = shown.locator(f"#chart-{chart} canvas").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    assert complaints == []


def test_long_run_has_few_points(opened: Open, tmp_path: Path, complaints: list[str]) -> None:
    long = make_run(tmp_path / "long", rows(40_000, 250))
    shown = opened(long)
    values = "JSON.parse(document.getElementById('data').textContent).charts.loss.spec.data.values"
    assert shown.evaluate(f"{values}.length") < 1200
    assert count_colors(shown, "loss") > 10
    assert complaints == []
