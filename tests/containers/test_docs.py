"""The commands of the documentation that need an engine, as they stand on its pages."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.conftest import PROJECT, TINY, Engine
from tests.pages import PAGES, REPOSITORY, blocks

pytestmark = pytest.mark.container


@pytest.fixture
def reader(engine: Engine, tmp_path: Path, page: str) -> Iterator[Engine]:
    """Someone who follows a page from its top, with a small model and with texts at home."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in (REPOSITORY / "app").rglob("*.py"):
        (texts / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    own = {"COMPOSE_PROJECT_NAME": f"{PROJECT}-docs", "HOME": str(tmp_path)}
    small = {name: value for name, value in TINY.items() if name != "PREPARE_OUT_DIR"}
    if page == "docs/own-data.md":
        # `train` finds the text that was prepared, unless another is named.
        del small["PREPARE_DATASET"]
    small["TRAIN_RUN_NAME"] = "fineweb20M"
    reader = Engine(engine.folder, engine.variables | small | own)
    yield reader
    reader.docker("compose", "--profile", "*", "down", "--volumes", "--remove-orphans")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.is_for_containers for block in blocks(page))]
)
def test_commands_work_in_their_order(reader: Engine, page: str) -> None:
    for block in blocks(page):
        if block.is_for_containers:
            reader.run("bash", "-euo", "pipefail", "-c", block.script)
