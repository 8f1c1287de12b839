from collections.abc import Callable
from pathlib import Path

import pytest

from app.settings.sources import load_settings
from app.tools.doctor.checks import Context
from tests.train.processes import TINY, Process

NewContext = Callable[..., Context]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, text_shards: Path) -> Path:
    """A DATA_DIR with the dataset `text` and the run `run`, which has 4 of 10 steps."""
    data_dir = tmp_path_factory.mktemp("trained")
    copy_tree(text_shards, data_dir / "text")
    code, output = Process(data_dir, TRAIN_MAX_STEPS=4, TRAIN_SAMPLE_EVERY=0).end()
    assert code == 0, output
    return data_dir


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder's files, without their modes."""
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


@pytest.fixture
def data_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`, to break."""
    copy_tree(trained, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def new_context(data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NewContext:
    """The context of the run in `data_dir`: new_context(TRAIN_MAX_STEPS=3)."""
    monkeypatch.chdir(tmp_path)

    def context(*, verify: bool = False, **changes: object) -> Context:
        own = {"DATA_DIR": str(data_dir), "PREPARE_DATASET": "stdlib", "PREPARE_OUT_DIR": "text"}
        flags = TINY | own | {name: str(value) for name, value in changes.items()}
        return Context(load_settings(flags, "doctor"), verify)

    return context
