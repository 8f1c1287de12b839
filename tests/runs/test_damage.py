"""Checkpoints and shards with other bytes than were written: never a wrong read."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import ExitCode, UserError
from app.prepare.pipeline import prepare
from app.prepare.sources import DatasetSpec, TextSource
from app.runs.checkpoint import (
    Snapshot,
    checkpoint_steps,
    open_checkpoint,
    prune_checkpoints,
    remove_partial_checkpoints,
    write_checkpoint,
)
from app.settings.settings import Settings
from app.train.main import train
from tests.train.conftest import TinySettings
from tests.train.processes import Start, assert_same_run, run_to_end

FLIPS = (10, pytest.param(100, marks=pytest.mark.soak))


def flip(path: Path, place: int) -> None:
    """Change one byte."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << place % 8]))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


@pytest.fixture
def stopped(tiny: TinySettings) -> Settings:
    """A run that has the checkpoints of steps 4 and 8, of ten; `unbroken` beside it went on."""
    settings = tiny(TRAIN_KEEP_CHECKPOINTS=3)
    train(settings)
    shutil.copytree(settings.run_dir, settings.run_dir.with_name("unbroken"))
    shutil.rmtree(checkpoint(settings.run_dir, 10))
    return settings


def damages() -> dict[str, Callable[[Path], None]]:
    def truncate(path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)

    return {
        "flipped": lambda path: flip(path, path.stat().st_size // 2),
        "truncated": truncate,
        "empty": lambda path: path.write_bytes(b""),
        "missing": Path.unlink,
    }


@pytest.mark.parametrize("file", ("model.safetensors", "optimizer.safetensors", "state.json"))
@pytest.mark.parametrize("kind", damages())
def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(
    stopped: Settings, capsys: pytest.CaptureFixture[str], file: str, kind: str
) -> None:
    damages()[kind](checkpoint(stopped.run_dir, 8) / file)
    capsys.readouterr()
    train(stopped)
    printed = capsys.readouterr()
    assert f"warning: {checkpoint(stopped.run_dir, 8)}" in printed.err
    assert "it is now step-000008.damaged" in printed.err
    assert "continues at step 4" in printed.out
    assert_same_run(stopped.run_dir, stopped.run_dir.with_name("unbroken"))


@pytest.mark.parametrize("flips", FLIPS)
def test_no_flipped_byte_is_read(stopped: Settings, tmp_path: Path, flips: int) -> None:
    """Anywhere in the last checkpoint: it is passed over; in both: the run does not start."""
    whole = tmp_path / "whole"
    shutil.copytree(stopped.run_dir, whole)
    places = random.Random(0)
    files = sorted(checkpoint(whole, 8).iterdir())
    for _ in range(flips):
        shutil.rmtree(stopped.run_dir)
        shutil.copytree(whole, stopped.run_dir)
        # Each file as often as the others: a place drawn from all bytes is never in state.json.
        file = places.choice(files).name
        place = places.randrange((checkpoint(whole, 8) / file).stat().st_size)
        for step in (4, 8):
            path = checkpoint(stopped.run_dir, step) / file
            flip(path, min(place, path.stat().st_size - 1))
        with pytest.raises(UserError, match="has no good checkpoint"):
            train(stopped)


def test_a_version_that_is_unknown_is_not_called_damaged(stopped: Settings) -> None:
    path = checkpoint(stopped.run_dir, 8) / "state.json"
    newer = json.loads(path.read_text()) | {"state_version": 3}
    del newer["sha256_of_the_rest"]
    whole = json.dumps(newer, sort_keys=True).encode()
    newer["sha256_of_the_rest"] = hashlib.sha256(whole).hexdigest()
    for version, state in ((1, {"state_version": 1}), (3, newer)):
        path.write_text(json.dumps(state))
        with pytest.raises(UserError, match=f"has state version {version}, this program reads 2"):
            train(stopped)


def test_a_checkpoint_whose_replacement_was_killed_is_back(stopped: Settings) -> None:
    whole = checkpoint(stopped.run_dir, 8)
    whole.rename(whole.with_name("step-000008.old.partial"))
    whole.with_name("step-000008.partial").mkdir()
    remove_partial_checkpoints(whole.parent)
    assert checkpoint_steps(whole.parent) == [4, 8]
    open_checkpoint(whole).verify()


def test_the_last_and_the_best_checkpoint_stay(stopped: Settings) -> None:
    folder = stopped.run_dir / "checkpoints"
    snapshot = Snapshot()
    snapshot.files = {"model.safetensors": {}, "optimizer.safetensors": {}}
    state = open_checkpoint(checkpoint(stopped.run_dir, 8)).state
    for step, loss in enumerate((5.0, 3.0, 4.0, None, 6.0, 4.0), start=20):
        write_checkpoint(
            folder / f"step-{step:06d}", snapshot, replace(state, step=step, val_loss=loss)
        )
        prune_checkpoints(folder, 2)
    assert checkpoint_steps(folder) == [21, 24, 25]


@pytest.mark.parametrize("flips", FLIPS)
def test_shards_with_other_bytes_are_never_trained_on(
    start: Start, tiny: TinySettings, data_dir: Path, flips: int
) -> None:
    folder = data_dir / "own"
    prepare(
        DatasetSpec(
            TextSource("stdlib"), "own", total_tokens=6000, val_tokens=1000, shard_size=2000
        ),
        folder,
    )
    unbroken = run_to_end(start, TRAIN_DATASET_DIR="own", TRAIN_RUN_NAME="unbroken")
    one, two = folder / "own_000000.bin", folder / "own_000001.bin"
    assert one.stat().st_size == two.stat().st_size

    def swap() -> None:
        bytes_of_one = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(bytes_of_one)

    swap()
    refused = start(TRAIN_DATASET_DIR="own")
    code, output = refused.end()
    assert code == ExitCode.USER, output
    assert f"error: shard {one} is damaged" in output
    assert "Traceback" not in output
    assert not (refused.run_dir / "checkpoints").exists()
    swap()
    settings = tiny(TRAIN_DATASET_DIR="own", TRAIN_MAX_STEPS=1, TRAIN_WARMUP_STEPS=0)
    places = random.Random(0)
    for _ in range(flips):
        place = places.randrange(two.stat().st_size)
        flip(two, place)
        with pytest.raises(UserError, match=re.escape(str(two))):
            train(settings)
        assert not (settings.run_dir / "checkpoints").exists()
        flip(two, place)
    continued = run_to_end(start, TRAIN_DATASET_DIR="own")
    assert_same_run(continued.run_dir, unbroken.run_dir)
