"""The playground's page in a real Chromium."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from tests.tools.browser import DESK, PHONE, chromium, opened, photograph_playground
from tests.tools.playground_process import Playground, playground
from tests.tools.written_run import write_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    data_dir = tmp_path_factory.mktemp("data")
    write_run(data_dir / "runs" / "other", 3, seed=1)
    for step in (7, 12):
        write_run(data_dir / "runs" / "small", step, seed=step)
    with playground(data_dir) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: Playground) -> Iterator[Page]:
    """The open page; the test fails if its console shows a warning or an error."""
    messages: list[str] = []

    def collect(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            messages.append(message.text)

    with opened(browser, "about:blank") as tab:
        tab.on("console", collect)
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.goto(server.url)
        expect(tab.locator("#step option")).to_have_count(2)
        yield tab
    assert messages == []


def generated_text(page: Page) -> str:
    return page.locator(".generated").first.text_content() or ""


def expect_done(page: Page, status: str) -> None:
    expect(page.locator("#status")).to_have_attribute("data-state", "done", timeout=60_000)
    expect(page.locator("#status-text")).to_have_text(status)


def test_text_grows_and_stop_ends_it_on_the_server(page: Page, server: Playground) -> None:
    page.fill("#prompt", "Once upon")
    page.fill("#max_tokens", "4096")
    page.click("#generate")
    expect(page.locator(".prompt").first).to_have_text("Once upon")
    expect(page.locator("#figures")).to_contain_text("tokens/s")
    before = generated_text(page)
    page.wait_for_function(
        "n => document.querySelector('.generated').textContent.length > n", arg=len(before)
    )
    assert generated_text(page).startswith(before)
    page.click("#stop")
    expect_done(page, "Stopped")
    line = server.next_line_matching(r"small: (\d+) tokens in .* s, stopped\n")
    assert int(line[1]) < 4096
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#stop")).to_be_hidden()


def test_keys_generate_and_stop(page: Page) -> None:
    page.fill("#max_tokens", "4096")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#figures")).to_contain_text("tokens/s")
    page.press("#prompt", "Escape")
    expect_done(page, "Stopped")


def test_slider_and_number_follow_each_other(page: Page) -> None:
    slider = page.locator("[data-for=temperature]")
    slider.focus()
    slider.press("ArrowRight")
    expect(page.locator("#temperature")).to_have_value("0.85")
    page.fill("#temperature", "1.5")
    expect(slider).to_have_value("1.5")


def test_input_is_kept_when_the_window_gets_the_focus_again(page: Page) -> None:
    page.fill("#prompt", "while")
    page.fill("#max_tokens", "")
    with page.expect_response("**/api/state"):
        page.evaluate("window.dispatchEvent(new Event('focus'))")
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#prompt")).to_have_value("while")
    expect(page.locator("#max_tokens")).to_have_value("")


def test_seed_and_checkpoint_determine_the_text(page: Page) -> None:
    texts = []
    page.fill("#max_tokens", "20")
    for seed, step in (("3", "12"), ("3", "12"), ("4", "12"), ("3", "7")):
        page.fill("#seed", seed)
        page.select_option("#step", step)
        page.click("#generate")
        expect_done(page, "Reached the token limit")
        expect(page.locator("#figures")).to_contain_text("40 tokens · ")
        texts.append(page.locator("#samples").text_content())
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_selecting_a_run_shows_its_steps(page: Page) -> None:
    page.select_option("#run", "other")
    expect(page.locator("#step")).to_have_text("3 · held-out 4.500")


def test_continue_uses_the_text_as_the_prompt(page: Page) -> None:
    page.fill("#prompt", "Once")
    page.fill("#max_tokens", "5")
    page.click("#generate")
    expect_done(page, "Reached the token limit")
    text = f"Once{generated_text(page)}"
    page.locator(".continue").first.click()
    expect(page.locator(".prompt").first).to_have_text(text, use_inner_text=False)
    expect_done(page, "Reached the token limit")


def test_texts_stand_side_by_side_and_each_token_shows_its_odds(page: Page) -> None:
    page.fill("#prompt", "Once")
    page.fill("#max_tokens", "5")
    page.fill("#num_samples", "3")
    page.click("#generate")
    expect_done(page, "Reached the token limit")
    expect(page.locator(".sample")).to_have_count(3)
    token = page.locator(".generated").last.locator("span").first
    token.hover()
    rows = page.locator("#odds div")
    expect(rows).to_have_count(6)
    shown = (token.text_content() or "").replace(" ", "␣").replace("\n", "⏎")
    expect(rows.first.locator("code")).to_have_text(shown)
    expect(rows.first).to_contain_text("%")
    page.hover("#prompt")
    expect(page.locator("#odds")).to_be_hidden()


def test_what_is_cut_off_a_long_prompt_is_struck_through(page: Page) -> None:
    page.fill("#prompt", "one two " * 50)
    page.fill("#max_tokens", "3")
    page.click("#generate")
    expect_done(page, "Reached the token limit")
    expect(page.locator("#note")).to_contain_text("the first 38 of the prompt's 102 tokens")
    cut = page.locator(".prompt del").first.text_content() or ""
    assert len(cut.split()) == 37


def test_generated_markup_is_shown_as_text(page: Page) -> None:
    page.fill("#prompt", "<img src=x onerror=alert(1)><b>bold</b>")
    page.fill("#max_tokens", "3")
    page.click("#generate")
    expect_done(page, "Reached the token limit")
    assert page.locator("#samples img, #samples b").count() == 0


def test_invalid_number_is_explained_on_the_page(browser: Browser, server: Playground) -> None:
    with opened(browser, server.url) as page:
        expect(page.locator("#step option")).to_have_count(2)
        for number, message in (
            ("-1", "temperature: must be greater"),
            ("", "temperature: must be a"),
        ):
            page.fill("#temperature", number)
            page.click("#generate")
            expect(page.locator("#status-text")).to_contain_text(message)
            expect(page.locator("#status")).to_have_attribute("data-state", "wrong")
        page.fill("#temperature", "1")
        page.fill("#max_tokens", "3")
        page.click("#generate")
        expect_done(page, "Reached the token limit")
        text = generated_text(page)
        page.fill("#num_samples", "1000000000")
        page.click("#generate")
        expect(page.locator("#status-text")).to_contain_text("num_samples: must be less")
        assert generated_text(page) == text


def test_lost_server_is_reported_on_the_page(browser: Browser, tmp_path: Path) -> None:
    with playground(tmp_path) as server, opened(browser, server.url) as page:
        expect(page.locator("#status-text")).to_have_text("No checkpoint yet: train a model first")
        expect(page.locator("#generate")).to_be_disabled()
        write_run(tmp_path / "runs" / "small")
        page.evaluate("window.dispatchEvent(new Event('focus'))")
        expect(page.locator("#generate")).to_be_enabled()
        expect(page.locator("#status-text")).to_have_text("Ready")
        page.fill("#max_tokens", "4096")
        page.click("#generate")
        expect(page.locator("#figures")).to_contain_text("tokens/s")
        server.process.kill()
        expect(page.locator("#status")).to_have_attribute("data-state", "wrong")
        page.click("#generate")
        expect(page.locator("#status-text")).to_contain_text("does not respond")


def test_an_unknown_run_is_named_on_the_page_with_those_there_are(
    browser: Browser, tmp_path: Path
) -> None:
    write_run(tmp_path / "runs" / "small")
    with playground(tmp_path, run="smal") as server, opened(browser, server.url) as page:
        expect(page.locator("#status-text")).to_contain_text("runs/smal: set TRAIN_RUN_NAME to one")
        expect(page.locator("#status-text")).to_contain_text("small")
        expect(page.locator("#generate")).to_be_enabled()


def test_colors_follow_the_system_theme(browser: Browser, server: Playground) -> None:
    brightness = {}
    for theme in ("light", "dark"):
        with opened(browser, server.url, theme=theme) as page:
            picture = np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB")) / 255
            brightness[theme] = float(picture.mean())
    assert brightness["light"] > 0.9
    assert brightness["dark"] < 0.2


@pytest.mark.parametrize("size", (DESK, PHONE, (320, 568)), ids=("desk", "phone", "small"))
def test_page_fits_the_width(browser: Browser, server: Playground, size: tuple[int, int]) -> None:
    with opened(browser, server.url, size=size) as page:
        expect(page.locator("#step option")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        for name in ("#prompt", "#generate", "#step", "[data-for=seed]"):
            box = page.locator(name).bounding_box()
            assert box
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0]


def test_screenshot_can_be_taken(browser: Browser, server: Playground, tmp_path: Path) -> None:
    path = tmp_path / "playground.png"
    photograph_playground(browser, server.url, path, prompt="Once", max_tokens=5)
    assert Image.open(path).size == (2 * DESK[0], 2 * DESK[1])
