"""The documentation is true: its commands work as they stand, its links lead somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings.sources import load_settings
from tests.newcomer import settle
from tests.pages import PAGES, REPOSITORY, blocks

# What stands after ```sh where a block is not run by these tests.
ELSEWHERE = {
    *("needs the hub", "on the rented machine", "by make", "until Ctrl-C"),
    *("on the cluster", "with a cloud account", "in .venv-cluster", "with pip"),
    *("in llm.c", "after the diff", "in .venv-trackers"),
}
# What a page has exported before, or a shorter run.
SHORT = {"TRAIN_MAX_STEPS": "5"}
EXPORTED = {
    "docs/tutorial.md": {"RECIPE": "demo"},
    # The warm-up of the demo has 8 steps.
    "docs/compare-runs.md": {"TRAIN_MAX_STEPS": "10", "TRAIN_COMPILE": "false"},
    "docs/own-data.md": SHORT,
}
RUN_HERE = [page for page in PAGES if any(block.is_run_here for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_run_or_says_where_it_would_be(page: str) -> None:
    assert {block.where for block in blocks(page)} <= {"", *ELSEWHERE}


def test_readme_comes_to_the_point() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first_screen, _, _ = re.sub("<!--.*?-->", "", text).partition("\n```")
    assert len([word for word in first_screen.split() if re.search(r"\w", word)]) <= 150


def test_the_index_names_every_page() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages - {"README.md"} <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        place = (REPOSITORY / page).parent / file if file else REPOSITORY / page
        assert place.exists(), target
        if heading:
            assert heading in headings(place.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_right(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```ini\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        (tmp_path / "page.env").write_text(block, encoding="utf-8")
        load_settings({"RECIPE": "./page.env"}, "train")


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as the forge makes them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of a shell in a folder that has recipes and texts, where python is ours."""
    settle(tmp_path, monkeypatch)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "recipes").symlink_to(REPOSITORY / "app" / "recipes")
    texts = tmp_path / "texts"
    texts.mkdir()
    written = [path for folder in ("app", "docs") for path in (REPOSITORY / folder).rglob("*.*")]
    for path in written:
        if path.suffix in (".py", ".md"):
            (texts / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    rows = [{"body": path.read_text(encoding="utf-8")} for path in texts.iterdir()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "pages.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.delenv("OMP_NUM_THREADS")
    return os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("page", RUN_HERE)
def test_commands_work_in_their_order(page: str, newcomer: dict[str, str]) -> None:
    for block in blocks(page):
        if not block.is_run_here:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.script],
            env=newcomer | EXPORTED.get(page, {}),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, block.script + done.stdout + done.stderr
