"""A dataset folder: sequences in an epoch, and the verification of hashes in the background."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.data.dataset import (
    Dataset,
    ShardVerification,
    is_held_out,
    open_dataset,
    shard_files,
)
from app.data.manifest import MANIFEST, Manifest, ShardInfo
from app.errors import UserError
from tests.prepare.conftest import write_shard


def dataset_of(folder: Path, *sizes: int) -> Dataset:
    """Write a dataset with a training shard of each size."""
    shards = []
    for number, size in enumerate(sizes):
        name = f"text_{number:06d}.bin"
        sha256 = write_shard(folder / name, np.full(size, number, np.uint16))
        shards.append(ShardInfo(name, "train", size, 1, sha256))
    Manifest({}, {}, {}, shards=tuple(shards), complete=True).save(folder)
    return open_dataset(folder)


def damage(path: Path) -> None:
    """Change the last token of a shard."""
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


@pytest.mark.parametrize(("context_length", "sequences"), ((1, 6), (2, 3), (3, 2), (6, 1)))
def test_sequences_cross_the_ends_of_shards(
    tmp_path: Path, context_length: int, sequences: int
) -> None:
    assert dataset_of(tmp_path, 3, 4).num_sequences(context_length) == sequences


def test_less_than_one_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few training tokens for one sequence: 8 are needed"):
        dataset_of(tmp_path, 3, 4).num_sequences(7)


def test_a_dataset_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    """Finished and unfinished ones, and those of another program, each with its training tokens."""

    def fix() -> str:
        with pytest.raises(UserError, match=r"no dataset in .*: there is no such folder") as caught:
            open_dataset(tmp_path / "missing", tmp_path)
        assert caught.value.fix.startswith("run `python -m app prepare` with the same settings, or")
        return caught.value.fix.partition(", or ")[2]

    assert fix() == "correct TRAIN_DATASET_DIR"
    for name in ("texts", "runs", "mine", "begun", "llm.c", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "story.txt").write_text("Once upon a time.")
    (tmp_path / "notes.txt").write_text("A file.")
    dataset_of(tmp_path / "mine", 300, 4000)
    manifest = dataset_of(tmp_path / "begun", 1).manifest
    assert manifest is not None
    replace(manifest, complete=False).save(tmp_path / "begun")
    for name in ("text_val_000000.bin", "text_train_000000.bin"):
        write_shard(tmp_path / "llm.c" / name, np.ones(50, np.uint16))
    (tmp_path / "damaged" / MANIFEST).write_text("{")
    assert fix() == (
        "set TRAIN_DATASET_DIR to one of: begun (1 token, not complete), llm.c (50 tokens), "
        "mine (4,300 tokens)"
    )


@pytest.mark.parametrize("threads", (1, 4))
def test_right_hashes_are_verified_in_order(tmp_path: Path, threads: int) -> None:
    verification = ShardVerification(dataset_of(tmp_path, 1, 200_000, 3, 4), threads)
    assert list(verification) == [f"text_{number:06d}.bin" for number in range(4)]
    verification.result()
    assert verification.done()


@pytest.mark.parametrize("threads", (1, 4))
def test_damaged_shard_is_named(tmp_path: Path, threads: int) -> None:
    dataset = dataset_of(tmp_path, 1, 2, 3)
    damage(tmp_path / "text_000001.bin")
    verification = ShardVerification(dataset, threads)
    assert verification.wait()
    assert verification.done()
    with pytest.raises(UserError, match=r"text_000001\.bin is damaged"):
        verification.result()
    names = iter(verification)
    assert next(names) == "text_000000.bin"
    with pytest.raises(UserError, match=r"text_000001\.bin is damaged"):
        next(names)


def test_shard_that_disappears_is_named(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, 1, 2)
    (tmp_path / "text_000001.bin").unlink()
    with pytest.raises(UserError, match=r"text_000001\.bin cannot be read: No such file"):
        ShardVerification(dataset).result()


def test_shards_without_a_manifest_have_no_hashes_to_compare(tmp_path: Path) -> None:
    write_shard(tmp_path / "text_000000.bin", np.zeros(5, np.uint16))
    verification = ShardVerification(open_dataset(tmp_path))
    assert verification.done()
    verification.result()
    assert list(verification) == []


def test_verification_that_blocks_is_not_done_until_it_can_read(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, 5)
    path = tmp_path / "text_000000.bin"
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    verification = ShardVerification(dataset)
    assert not verification.done()
    assert not verification.wait(0.01)
    path.write_bytes(content)
    assert verification.wait()
    verification.result()


LEAVE_AT_ONCE = """
import os, sys
from pathlib import Path
from app.data.dataset import ShardVerification, open_dataset
folder = Path(sys.argv[1])
dataset = open_dataset(folder)
(folder / "text_000000.bin").unlink()
os.mkfifo(folder / "text_000000.bin")
assert not ShardVerification(dataset).done()
"""


def test_program_that_ends_does_not_wait_for_the_verification(tmp_path: Path) -> None:
    dataset_of(tmp_path, 5)
    subprocess.run([sys.executable, "-c", LEAVE_AT_ONCE, tmp_path], check=True, timeout=300)


def write_shards(folder: Path, **sizes: int) -> Path:
    """Write a shard of each size, filled with its size, by name without .bin."""
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        write_shard(folder / f"{name}.bin", np.full(size, size, np.uint16))
    return folder


@pytest.mark.parametrize(
    "name",
    (
        "val.bin",
        "VAL.BIN",
        "fineweb_val_000000.bin",
        "tiny_shakespeare_val.bin",
        "validation-00000-of-00001.bin",
        "c4-Valid.0.bin",
        "test.bin",
        "testset_3.bin",
        "wiki.test.bin",
        "dev2.bin",
        "my dev.bin",
        "eval_0.bin",
        "heldout.bin",
        "text-held-out-1.bin",
        "held_out.bin",
        "HoldOut.bin",
        "train_val.bin",
    ),
)
def test_names_of_other_programs_for_held_out_shards(name: str) -> None:
    assert is_held_out(name)


@pytest.mark.parametrize(
    "name",
    (
        "train.bin",
        "fineweb_000000.bin",
        "TinyStories_train.bin",
        "latest.bin",
        "medieval_0.bin",
        "developers_0.bin",
        "contest.bin",
        "values.bin",
        "carnival.bin",
        "dev-corpus_train_000000.bin",
        "eval.training.3.bin",
    ),
)
def test_names_of_shards_to_train_on(name: str) -> None:
    assert not is_held_out(name)


def test_shards_named_as_held_out_are_not_trained_on(tmp_path: Path) -> None:
    dataset = open_dataset(write_shards(tmp_path, train=9, val=5, heldout=4, Test=3))
    assert [len(shard) for shard in dataset.train] == [9]
    # By name, upper case first.
    assert [len(shard) for shard in dataset.val] == [3, 4, 5]


def test_only_visible_files_named_bin_are_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", TRAIN=9)
    (folder / "TRAIN.bin").rename(folder / "TRAIN.BIN")
    (folder / "._VAL.bin").write_bytes(b"a Mac's copy of attributes")
    (folder / "val.bin").mkdir()
    os.mkfifo(folder / "pipe.bin")
    (folder / "notes.bin.txt").touch()
    assert [path.name for path in shard_files(folder)] == ["TRAIN.BIN"]
    assert len(open_dataset(folder).train) == 1


def test_a_run_of_an_earlier_version_continues_unless_it_trained_on_held_out_text(
    tmp_path: Path,
) -> None:
    """The fingerprints that llm.c's shards had before more names were known."""
    names = {"a_000000": 9, "a_val_000000": 5}
    known = hashlib.sha256(b"a_000000.bin\t9\na_val_000000.bin\t5\n").hexdigest()
    assert open_dataset(write_shards(tmp_path / "1", **names)).fingerprint == known
    trained_on_both = hashlib.sha256(b"train.bin\t9\nval.bin\t5\n").hexdigest()
    assert open_dataset(write_shards(tmp_path / "2", train=9, val=5)).fingerprint != trained_on_both


def test_shards_that_all_look_held_out_are_refused_for_training(tmp_path: Path) -> None:
    dataset = open_dataset(write_shards(tmp_path, test_000000=9, test_val_000000=5))
    assert len(dataset.val) == 2
    with pytest.raises(UserError, match=r"all shards .* named as held-out.*\n.*rename those to tr"):
        dataset.num_sequences(4)


def test_held_out_text_shorter_than_a_sequence_is_told_with_the_number_that_would_do(
    tmp_path: Path,
) -> None:
    dataset = open_dataset(write_shards(tmp_path, train=2000, val=1001))
    assert dataset.lack_of_held_out_text(1000) is None
    problem, fix = dataset.lack_of_held_out_text(1024) or ("", "")
    assert "has 1,001 held-out tokens, and a sequence needs 1,025" in problem
    assert "PREPARE_VAL_TOKENS=1024 or more" in fix
    (tmp_path / "val.bin").rename(tmp_path / "more.bin")
    problem, fix = open_dataset(tmp_path).lack_of_held_out_text(10) or ("", "")
    assert "has no shard named as held-out text" in problem
    assert fix == "rename one, for example to NAME_val_000000.bin"
