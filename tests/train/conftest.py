import os
from collections.abc import Callable
from pathlib import Path

import pytest

from app.data.prepare import prepare
from app.settings import Settings
from app.sources import load_settings

TINY = {
    "MODEL_CONTEXT_LENGTH": "32",
    "MODEL_NUM_LAYERS": "2",
    "MODEL_EMBD_SIZE": "16",
    "MODEL_NUM_HEADS": "2",
    "TRAIN_TOKENS_PER_STEP": "256",
    "TRAIN_MICRO_BATCH_SIZE": "4",
    "TRAIN_MAX_STEPS": "10",
    "TRAIN_LEARNING_RATE": "1e-2",
    "TRAIN_WARMUP_STEPS": "2",
    "TRAIN_DATASET_DIR": "text",
    "TRAIN_RUN_NAME": "run",
    "TRAIN_DEVICE": "cpu",
    "TRAIN_COMPILE": "false",
    "TRAIN_PRECISION": "float32",
    "TRAIN_VAL_TOKENS": "512",
    "TRAIN_VAL_EVERY": "5",
    "TRAIN_SAMPLE_EVERY": "5",
    "TRAIN_CHECKPOINT_EVERY": "4",
    "SAMPLE_MAX_TOKENS": "12",
    "SAMPLE_NUM_SAMPLES": "1",
}

TinySettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of real text: the standard library, in several shards."""
    folder = tmp_path_factory.mktemp("prepared") / "text"
    prepare("stdlib", folder, name="stdlib", total_tokens=6000, val_tokens=1000, shard_size=2500)
    return folder


@pytest.fixture
def data_dir(text_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DATA_DIR with the dataset `text`, in an environment without settings."""
    for name in os.environ:
        if name.startswith(("PREPARE_", "MODEL_", "TRAIN_", "SAMPLE_", "EVALUATE_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text").symlink_to(text_shards)
    return tmp_path / "data"


@pytest.fixture
def tiny(data_dir: Path) -> TinySettings:
    """Settings of a run that takes a second: tiny(TRAIN_MAX_STEPS=3)."""

    def settings(**changes: object) -> Settings:
        flags = TINY | {name: str(value) for name, value in changes.items()}
        return load_settings(flags | {"DATA_DIR": str(data_dir)}, "train")

    return settings
