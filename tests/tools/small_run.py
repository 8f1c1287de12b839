"""A small model trained on real text by the program itself, in a few seconds."""

from pathlib import Path

import pytest

from app.errors import ExitCode
from tests.newcomer import settle, type_in

CONTEXT_LENGTH = 64
SETTINGS = f"""\
PREPARE_DATASET=stdlib
PREPARE_TOTAL_TOKENS=20000
PREPARE_VAL_TOKENS=2000
PREPARE_SHARD_SIZE=1500
PREPARE_OUT_DIR=words
MODEL_CONTEXT_LENGTH={CONTEXT_LENGTH}
MODEL_NUM_LAYERS=3
MODEL_EMBD_SIZE=32
MODEL_NUM_HEADS=4
TRAIN_RUN_NAME=small
TRAIN_TOKENS_PER_STEP=256
TRAIN_MAX_STEPS=20
TRAIN_LEARNING_RATE=0.03
TRAIN_SAMPLE_EVERY=0
TRAIN_VAL_EVERY=10
TRAIN_CHECKPOINT_EVERY=10
TRAIN_COMPILE=false
TRAIN_PRECISION=float32
TRAIN_DEVICE=cpu
"""
RUN = Path("data/runs/small")


def train_small_run(folder: Path) -> Path:
    """Prepare text and train on it in `folder`, with the settings in .env there."""
    (folder / ".env").write_text(SETTINGS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        settle(folder, patch)
        assert type_in("prepare", patch) == ExitCode.DONE
        assert type_in("train", patch) == ExitCode.DONE
    return folder
