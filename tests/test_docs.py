"""The documentation is true: its commands work as they stand, its links lead somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings.sources import load_settings
from tests.model.transformers_models import gpt2
from tests.newcomer import settle
from tests.pages import PAGES, REPOSITORY, blocks
from tests.prepare.hub_folders import write_fineweb, write_parquet
from tests.prepare.loopback_hub import Hub

# What stands after ```sh where a block is not run as it stands, and the tests of what it does.
ELSEWHERE = {
    "after the diff": "tests/test_change_the_model.py",
    "by make": "tests/test_docs.py",
    "needs the hub": "tests/test_docs.py",
    "in .venv-cluster": "tests/cluster/test_prepare.py",
    "in .venv-trackers": "tests/runs/test_trackers.py",
    "in llm.c": "tests/data/test_readers.py",
    "on the cluster": "tests/distributed/test_slurm.py",
    "on the rented machine": "tests/containers/test_cloud_init.py",
    "until Ctrl-C": "tests/tools/test_playground.py",
    "with a cloud account": "tests/test_sky.py",
    "with pip": "tests/test_package.py",
}
# Fewer and smaller steps. Most of the work of a small model is its output layer.
SMALL = {
    "MODEL_CONTEXT_LENGTH": "128",
    "MODEL_EMBD_SIZE": "32",
    "MODEL_NUM_HEADS": "4",
    "TRAIN_TOKENS_PER_STEP": "128",
    "TRAIN_VAL_TOKENS": "256",
    "SAMPLE_MAX_TOKENS": "20",
}
SHORTER = {
    # The warm-up of the demo has 8 steps.
    "docs/compare-runs.md": SMALL | {"TRAIN_MAX_STEPS": "10", "TRAIN_COMPILE": "false"},
    "docs/own-data.md": {"TRAIN_MAX_STEPS": "5", "TRAIN_COMPILE": "false"}
    | {"TRAIN_VAL_TOKENS": "1024", "SAMPLE_MAX_TOKENS": "20"},
    "docs/sweeps.md": {"PREPARE_TOTAL_TOKENS": "20k", "MODEL_NUM_LAYERS": "1"}
    | {"TRAIN_COMPILE": "false", "TRAIN_MAX_STEPS": "9", "TRAIN_TOKENS_PER_STEP": "128"}
    | {"TRAIN_VAL_TOKENS": "256", "TRAIN_SAMPLE_EVERY": "0"},
    "docs/tutorial.md": SMALL,
}
# A model that needs seconds, for the recipes of large ones.
TINY = {
    "MODEL_CONTEXT_LENGTH": "32",
    "MODEL_NUM_LAYERS": "3",
    "MODEL_EMBD_SIZE": "48",
    "MODEL_NUM_HEADS": "4",
    "TRAIN_MAX_STEPS": "6",
    "TRAIN_TOKENS_PER_STEP": "64",
    "TRAIN_MOMENTUM_WARMUP_STEPS": "0",
    "TRAIN_VAL_TOKENS": "64",
    "TRAIN_COMPILE": "false",
    "PREPARE_VAL_TOKENS": "200",
}
RUN_HERE = [page for page in PAGES if any(block.is_run_here for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_run_or_says_where_it_would_be(page: str) -> None:
    for block in blocks(page):
        assert (
            block.is_run_here
            or block.is_for_containers
            or (REPOSITORY / ELSEWHERE[block.where]).exists()
        )


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
def test_modules_have_the_names_that_pages_give_them(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:app|tests|benchmarks)/[\w/]+\.py)`", text):
        assert (REPOSITORY / name).exists(), name


def test_modules_have_the_names_that_the_drawing_gives_them() -> None:
    drawing = (REPOSITORY / "docs" / "pictures" / "architecture.svg").read_text(encoding="utf-8")
    names = re.findall(r">(\w+/\w+\.py)<", drawing)
    assert len(names) > 10
    for name in names:
        assert (REPOSITORY / "app" / name).exists(), name


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
    return os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def run_as_typed(script: str, environment: dict[str, str]) -> None:
    """Run the lines of a block in the current folder, up to the first one that fails."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, script + done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("page", RUN_HERE)
def test_commands_work_in_their_order(page: str, newcomer: dict[str, str]) -> None:
    exported = ""
    for block in blocks(page):
        if block.is_run_here:
            run_as_typed(exported + block.script, newcomer | SHORTER.get(page, {}))
        exported += "".join(re.findall(r"^export .*\n", block.script, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.processes
def test_commands_that_need_the_hub_work_with_one(newcomer: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time there was a model. " * 200)
    gpt2().save_pretrained(tmp_path / "gpt2")
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "texts").glob("*.md")]
    dataset = write_fineweb(tmp_path / "hub", [texts])
    write_parquet(dataset / "data" / "tiny" / "000.parquet", texts)
    with Hub() as hub:
        hub.publish("openai-community/gpt2", tmp_path / "gpt2")
        hub.publish("roneneldan/TinyStories", dataset)
        hub.publish("HuggingFaceFW/fineweb", dataset)
        environment = newcomer | TINY | hub.variables
        run_as_typed("RECIPE=qwen3-124M python -m app prepare --total-tokens 20000", environment)
        for block in (block for page in PAGES for block in blocks(page)):
            if block.where == "needs the hub" and "docker" not in block.script:
                run_as_typed(block.script.replace("19000", "12"), environment)


@pytest.mark.processes
@pytest.mark.parametrize("page", PAGES)
def test_make_has_the_targets(page: str) -> None:
    for block in blocks(page):
        for targets in re.findall(r"^make ([\w -]+)", block.script, re.MULTILINE):
            command = ["make", "--dry-run", *targets.split()]
            subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)


@pytest.mark.slow
@pytest.mark.processes
def test_make_demo_ends_with_a_report(newcomer: dict[str, str], tmp_path: Path) -> None:
    short = {"TRAIN_COMPILE": "false", "TRAIN_MAX_STEPS": "10"}
    small = {"PREPARE_TOTAL_TOKENS": "20000", "PREPARE_VAL_TOKENS": "2000"}
    # The environment is there: these tests run in it.
    there = "TORCH=auto PYTHON=python3 --assume-old=.venv/.installed-auto-python3"
    script = f"make -C {REPOSITORY} {there} demo"
    run_as_typed(script, newcomer | short | small | {"DATA_DIR": str(tmp_path / "data")})
    assert (tmp_path / "data/runs/demo/report/report.html").exists()
