"""A real Chromium, without a window."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright

# What a person has in front of them, in CSS pixels.
DESK = (1280, 860)
PHONE = (390, 844)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium; it asks nobody on the network for anything."""
    program = shutil.which("chromium")
    assert program, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser,
    url: str,
    *,
    theme: Literal["light", "dark"] = "light",
    size: tuple[int, int] = DESK,
) -> Iterator[Page]:
    """A page, in a window of its own without any history."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=theme,
        device_scale_factor=2,
        has_touch=size == PHONE,
    )
    try:
        page = context.new_page()
        page.goto(url)
        yield page
    finally:
        context.close()


def photograph_playground(
    browser: Browser,
    url: str,
    path: Path,
    *,
    prompt: str,
    theme: Literal["light", "dark"] = "light",
    size: tuple[int, int] = DESK,
    max_tokens: int = 200,
) -> None:
    """Let the playground at `url` write, and keep a picture of it."""
    with opened(browser, url, theme=theme, size=size) as page:
        page.wait_for_selector("#step option", state="attached")
        page.fill("#prompt", prompt)
        page.fill("#max_tokens", str(max_tokens))
        page.click("#generate")
        page.wait_for_selector('#status:is([data-state="done"], [data-state="wrong"])', timeout=0)
        page.locator(".generated span", has_text=re.compile("[a-z]{3}")).first.hover()
        page.screenshot(path=path)
