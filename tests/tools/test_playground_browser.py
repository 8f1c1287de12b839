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
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, server: Playground) -> Iterator[Page]:
    """The page, which may complain about nothing."""
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    with opened(browser, "about:blank") as tab:
        tab.on("console", note)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(server.url)
        expect(tab.locator("#step option")).to_have_count(2)
        yield tab
    assert complaints == []


def drawn(page: Page) -> str:
    return page.locator("#drawn").text_content() or ""


def is_done(page: Page, words: str) -> None:
    expect(page.locator("#status")).to_have_attribute("data-state", "done", timeout=60_000)
    expect(page.locator("#said")).to_have_text(words)


def test_text_grows_and_stop_ends_it_on_the_server(page: Page, server: Playground) -> None:
    page.fill("#prompt", "Once upon")
    page.fill("#max_tokens", "4096")
    page.click("#generate")
    expect(page.locator("#begun")).to_have_text("Once upon")
    expect(page.locator("#figures")).to_contain_text("tokens/s")
    before = drawn(page)
    page.wait_for_function(
        "n => document.getElementById('drawn').textContent.length > n", arg=len(before)
    )
    assert drawn(page).startswith(before)
    page.click("#stop")
    is_done(page, "Stopped")
    said = server.said_matching(r"small: (\d+) tokens in .* s, stopped\n")
    assert int(said[1]) < 4096
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#stop")).to_be_hidden()


def test_keys_generate_and_stop(page: Page) -> None:
    page.fill("#max_tokens", "4096")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#figures")).to_contain_text("tokens/s")
    page.press("#prompt", "Escape")
    is_done(page, "Stopped")


def test_a_slider_and_its_number_move_each_other(page: Page) -> None:
    slider = page.locator("[data-for=temperature]")
    slider.focus()
    slider.press("ArrowRight")
    expect(page.locator("#temperature")).to_have_value("0.85")
    page.fill("#temperature", "1.5")
    expect(slider).to_have_value("1.5")


def test_who_comes_back_finds_what_they_have_typed(page: Page) -> None:
    page.fill("#prompt", "while")
    page.fill("#max_tokens", "")
    with page.expect_response("**/api/state"):
        page.evaluate("window.dispatchEvent(new Event('focus'))")
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#prompt")).to_have_value("while")
    expect(page.locator("#max_tokens")).to_have_value("")


def test_the_seed_and_the_checkpoint_decide_the_text(page: Page) -> None:
    texts = []
    page.fill("#max_tokens", "20")
    for seed, step in (("3", "12"), ("3", "12"), ("4", "12"), ("3", "7")):
        page.fill("#seed", seed)
        page.select_option("#step", step)
        page.click("#generate")
        is_done(page, "All tokens are drawn")
        expect(page.locator("#figures")).to_contain_text("20 tokens · ")
        texts.append(drawn(page))
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_another_run_brings_its_own_steps(page: Page) -> None:
    page.select_option("#run", "other")
    expect(page.locator("#step")).to_have_text("3 · held-out 4.500")


def test_continue_takes_the_text_as_the_prompt(page: Page) -> None:
    page.fill("#prompt", "Once")
    page.fill("#max_tokens", "5")
    page.click("#generate")
    is_done(page, "All tokens are drawn")
    text = f"Once{drawn(page)}"
    page.click("#continue")
    expect(page.locator("#begun")).to_have_text(text, use_inner_text=False)
    is_done(page, "All tokens are drawn")


def test_what_the_model_writes_is_text_and_never_markup(page: Page) -> None:
    page.fill("#prompt", "<img src=x onerror=alert(1)><b>bold</b>")
    page.fill("#max_tokens", "3")
    page.click("#generate")
    is_done(page, "All tokens are drawn")
    assert page.locator("#text img, #text b").count() == 0


def test_a_bad_number_is_told_on_the_page(browser: Browser, server: Playground) -> None:
    with opened(browser, server.url) as page:
        expect(page.locator("#step option")).to_have_count(2)
        for number, said in (
            ("-1", "temperature: must be greater"),
            ("", "temperature: must be a"),
        ):
            page.fill("#temperature", number)
            page.click("#generate")
            expect(page.locator("#said")).to_contain_text(said)
            expect(page.locator("#status")).to_have_attribute("data-state", "wrong")
        page.fill("#temperature", "1")
        page.fill("#max_tokens", "3")
        page.click("#generate")
        is_done(page, "All tokens are drawn")


def test_a_server_that_is_gone_is_told_on_the_page(browser: Browser, tmp_path: Path) -> None:
    with playground(tmp_path) as server, opened(browser, server.url) as page:
        expect(page.locator("#said")).to_have_text("There is no checkpoint yet: train first")
        expect(page.locator("#generate")).to_be_disabled()
        write_run(tmp_path / "runs" / "small")
        page.evaluate("window.dispatchEvent(new Event('focus'))")
        expect(page.locator("#generate")).to_be_enabled()
        page.fill("#max_tokens", "4096")
        page.click("#generate")
        expect(page.locator("#figures")).to_contain_text("tokens/s")
        server.process.kill()
        expect(page.locator("#status")).to_have_attribute("data-state", "wrong")
        page.click("#generate")
        expect(page.locator("#said")).to_contain_text("does not answer")


def test_it_follows_the_readers_light_or_dark(browser: Browser, server: Playground) -> None:
    brightness = {}
    for theme in ("light", "dark"):
        with opened(browser, server.url, theme=theme) as page:
            picture = np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB")) / 255
            brightness[theme] = float(picture.mean())
    assert brightness["light"] > 0.9
    assert brightness["dark"] < 0.2


@pytest.mark.parametrize("size", (DESK, PHONE, (320, 568)), ids=("desk", "phone", "small"))
def test_nothing_is_cut_off_at_the_side(
    browser: Browser, server: Playground, size: tuple[int, int]
) -> None:
    with opened(browser, server.url, size=size) as page:
        expect(page.locator("#step option")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        for name in ("#prompt", "#generate", "#step", "[data-for=seed]"):
            box = page.locator(name).bounding_box()
            assert box
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0]


def test_a_picture_can_be_taken(browser: Browser, server: Playground, tmp_path: Path) -> None:
    path = tmp_path / "playground.png"
    photograph_playground(browser, server.url, path, prompt="Once", max_tokens=5)
    assert Image.open(path).size == (2 * DESK[0], 2 * DESK[1])
