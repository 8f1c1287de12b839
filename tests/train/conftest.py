import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load
from torch import Tensor

from app.data.dataset import Dataset, open_dataset
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from app.runs.checkpoint import Snapshot, open_checkpoint, write_checkpoint
from app.settings.settings import Settings
from app.settings.sources import load_settings
from tests.distributed.ranks import Ranks
from tests.train.processes import TINY, Process, Start, Unbroken

TinySettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of real text: the standard library, in several shards."""
    folder = tmp_path_factory.mktemp("prepared") / "text"
    prepare(
        DatasetSpec(
            TextSource("stdlib"), "stdlib", total_tokens=6000, val_tokens=1000, shard_size=2500
        ),
        folder,
    )
    return folder


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that run a function together."""
    with closing(Ranks(2, tmp_path_factory.mktemp("ranks"))) as ranks:
        yield ranks


@pytest.fixture
def data_dir(text_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DATA_DIR with the dataset `text`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text").symlink_to(text_shards)
    return tmp_path / "data"


@pytest.fixture
def start(data_dir: Path) -> Start:
    """Start a training process: start(TRAIN_MAX_STEPS=3)."""
    return lambda **changes: Process(data_dir, **changes)


@pytest.fixture(scope="session")
def unbroken(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """The folder of an uninterrupted run: unbroken(TRAIN_PROCESSES=4). All tests share it."""
    data_dir = tmp_path_factory.mktemp("unbroken")
    (data_dir / "text").symlink_to(text_shards)

    @cache
    def run_dir(**changes: object) -> Path:
        name = "-".join(["run", *(str(value) for value in changes.values())])
        process = Process(data_dir, **changes, TRAIN_RUN_NAME=name)
        code, output = process.end()
        assert code == 0, output
        return process.run_dir

    return run_dir


@pytest.fixture
def tiny(data_dir: Path) -> TinySettings:
    """Settings of a run that takes a second: tiny(TRAIN_MAX_STEPS=3)."""

    def settings(**changes: object) -> Settings:
        flags = TINY | {name: str(value) for name, value in changes.items()}
        return load_settings(flags | {"DATA_DIR": str(data_dir)}, "train")

    return settings


@dataclass
class HeldBack:
    """A dataset one of whose shards has bytes only when they are fed: it is a named pipe."""

    dataset: Dataset
    pipe: Path
    shard: Path

    def feed(self, *, damaged: bool = False) -> None:
        content = bytearray(self.shard.read_bytes())
        content[-1] ^= damaged
        self.pipe.write_bytes(content)


@pytest.fixture
def held_back(tmp_path: Path, text_shards: Path) -> HeldBack:
    dataset, folder = open_dataset(text_shards), tmp_path / "held-back"
    folder.mkdir()
    first, *others = sorted(text_shards.glob("*.bin"))
    for shard in others:
        (folder / shard.name).symlink_to(shard)
    os.mkfifo(folder / first.name)
    return HeldBack(replace(dataset, folder=folder), folder / first.name, first)


def rewrite_checkpoint(
    folder: Path, file: str, change: Callable[[dict[str, Tensor]], None]
) -> None:
    """Change the tensors in one file of a checkpoint, and its hashes with them."""
    state = open_checkpoint(folder).state
    snapshot = Snapshot()
    for path in folder.glob("*.safetensors"):
        snapshot.files[path.name] = load(path.read_bytes())
    change(snapshot.files[file])
    shutil.rmtree(folder)
    write_checkpoint(folder, snapshot, state)
