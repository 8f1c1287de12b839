"""The live report in a real Chromium, while runs grow."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.tools.browser import DESK, PHONE, chromium, opened
from tests.tools.run_folders import make_run, rows
from tests.tools.served import Served

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, lowest in (("adamw", 3.5), ("muon", 3.0)):
        samples = {step: [f"text {step}"] for step in (10, 20)}
        make_run(tmp_path / "runs" / name, rows(20, 10, lowest=lowest), samples=samples)
    return tmp_path / "runs"


@pytest.fixture
def served(runs: Path) -> Iterator[Served]:
    with Served(runs.parent, "report", "--serve", "muon").running() as started:
        yield started


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The open page; the test fails if its console says anything."""
    messages: list[str] = []
    with opened(browser, "about:blank") as tab:
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.goto(served.url)
        drawn(tab, "muon")
        yield tab
    assert messages == []


def drawn(page: Page, *names: str) -> None:
    """Wait until exactly these runs are drawn."""
    runs = json.dumps(names, separators=(",", ":"))
    page.wait_for_selector(f"body[data-drawn*='\"runs\":{runs}']")


def grow(run: Path, steps: int) -> None:
    written = (run / "metrics.jsonl").read_text().count("\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(steps, 10)[written:])


def figure(page: Page, name: str) -> str:
    return page.locator(".figures div", has_text=name).locator("dd").first.inner_text()


def test_the_page_grows_and_keeps_what_was_opened(page: Page, runs: Path) -> None:
    assert figure(page, "steps") == "20"
    page.locator("summary", has_text="Hardware").click()
    page.locator(".samples input").fill("0")
    page.click("[data-choice=theme] button[value=dark]")
    before = page.locator("#chart-loss canvas").screenshot()
    grow(runs / "muon", 38)
    expect(page.locator(".figures div", has_text="steps").locator("dd").first).to_have_text("38")
    expect(page.locator("html[data-theme=dark]")).to_be_visible()
    assert page.locator("details", has_text="Hardware").get_attribute("open") is None
    assert page.locator(".samples article:visible pre").inner_text() == "text 10"
    page.wait_for_function("document.querySelectorAll('#chart-loss canvas').length === 1")
    assert page.locator("#chart-loss canvas").screenshot() != before


def test_runs_are_laid_over_each_other_by_choice(page: Page, runs: Path) -> None:
    page.locator(".runs input[value=adamw]").check()
    drawn(page, "muon", "adamw")
    assert page.url.endswith("/?run=muon&run=adamw")
    assert page.title() == "muon · adamw"
    expect(page.locator("h2").first).to_have_text("Results")
    assert page.locator("#chart-held_out_loss canvas").count() == 1
    # A run that begins while the page is open is offered, too.
    make_run(runs / "later", rows(20, 10, lowest=2.5))
    page.locator(".runs input[value=later]").check()
    drawn(page, "muon", "adamw", "later")
    for name in ("muon", "adamw", "later"):
        page.locator(f".runs input[value={name}]").uncheck()
    drawn(page)
    assert page.title() == "No run is chosen"
    assert page.locator("canvas").count() == 0


def test_a_zoomed_chart_stays_zoomed(page: Page, runs: Path) -> None:
    chart = page.locator("#chart-loss canvas")
    chart.scroll_into_view_if_needed()
    axis = "canvas => canvas.toDataURL()"
    whole = chart.evaluate(axis)
    chart.hover()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -600)
    page.keyboard.up("Control")
    page.mouse.move(1, 1)
    page.wait_for_function(
        "before => document.querySelector('#chart-loss canvas').toDataURL() !== before", arg=whole
    )
    zoomed = chart.evaluate(axis)
    page.click("[data-choice=theme] button[value=dark]")
    page.wait_for_selector('body[data-drawn*=\'"theme":"dark"\']')
    page.click("[data-choice=theme] button[value=light]")
    page.wait_for_selector('body[data-drawn*=\'"theme":"light"\']')
    assert chart.evaluate(axis) == zoomed


def test_a_server_that_has_ended_is_said(browser: Browser, served: Served) -> None:
    with opened(browser, served.url) as page:
        drawn(page, "muon")
        expect(page.locator("#lost")).to_be_hidden()
        served.process.kill()
        expect(page.locator("#lost")).to_be_visible(timeout=15_000)
        assert figure(page, "steps") == "20"


@pytest.mark.parametrize("theme", ("light", "dark"))
@pytest.mark.parametrize("size", (DESK, PHONE))
def test_the_page_fits_the_window(
    browser: Browser, served: Served, runs: Path, size: tuple[int, int], theme: str
) -> None:
    for number in range(40):
        make_run(runs / f"learning-rate-{number:02}-of-a-sweep", rows(3))
    long = "r" * 200
    make_run(runs / long, rows(20, 10))
    url = f"{served.url}/?run=muon&run={long}&run=none"
    with opened(browser, url, theme="dark" if theme == "dark" else "light", size=size) as page:
        drawn(page, "muon", long)
        assert page.locator(f"html[data-theme={theme}]").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        assert page.locator(".note:visible").all_inner_texts() == [
            "there is no run none; it appears here once it has begun"
        ]
