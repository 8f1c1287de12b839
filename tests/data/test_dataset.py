"""A dataset folder: sequences in an epoch, and the verification of hashes in the background."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.data.dataset import Dataset, ShardVerification, open_dataset
from app.data.manifest import Manifest, ShardInfo
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
    subprocess.run([sys.executable, "-c", LEAVE_AT_ONCE, tmp_path], check=True, timeout=60)
