"""A dataset folder: its shards opened, and their hashes compared."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.containers import program
from app.data.manifest import Manifest, ShardInfo, refuse_other_size, refuse_wrong_hash
from app.data.shards import Tokens, open_shard
from app.errors import UserError
from app.prefetch import prefetch


@dataclass(frozen=True)
class Dataset:
    """The shards of a folder, verified and memory-mapped.

    Attributes:
        train, val: uint16 [count] a shard, in order
        fingerprint: changes when the tokens do
    """

    folder: Path
    train: list[Tokens]
    val: list[Tokens]
    fingerprint: str


def open_dataset(folder: Path) -> Dataset:
    """Open a folder that `prepare` or llm.c has written.

    Raises:
        UserError: there is no dataset, it is incomplete, or a shard is not what it should be.
    """
    fix = f"run `{program()} prepare` with the same settings, or correct TRAIN_DATASET_DIR"
    if not folder.is_dir():
        raise UserError(f"no dataset in {folder}: there is no such folder", fix)
    manifest = Manifest.load(folder)
    if manifest is None:
        names = sorted(path.name for path in folder.glob("*.bin"))
        if not names:
            raise UserError(f"no dataset in {folder}: it holds no shard (*.bin)", fix)
        opened = {name: open_shard(folder / name) for name in names}
        listing = "".join(f"{name}\t{opened[name].size}\n" for name in names)
        held_out = {name for name in names if re.search(r"_val[_.]", name)}
    else:
        if not manifest.complete:
            raise UserError(
                f"the dataset in {folder} is not complete: prepare stopped after "
                f"{manifest.tokens('train'):,} training tokens",
                f"run `{program()} prepare` with the same settings to complete it",
            )
        opened = {shard.file: open_shard(folder / shard.file) for shard in manifest.shards}
        for shard in manifest.shards:
            refuse_other_size(folder, shard, opened[shard.file])
        listing = "".join(f"{shard.file}\t{shard.sha256}\n" for shard in manifest.shards)
        held_out = {shard.file for shard in manifest.shards if shard.split == "val"}
    return Dataset(
        folder,
        train=[tokens for name, tokens in opened.items() if name not in held_out],
        val=[tokens for name, tokens in opened.items() if name in held_out],
        fingerprint=hashlib.sha256(listing.encode()).hexdigest(),
    )


def verify_shards(folder: Path, threads: int) -> Iterator[str]:
    """Yield the name of each shard whose SHA-256 is the manifest's, in order; without one, none.

    Args:
        threads: that hash at the same time; a disk can be faster than one core.

    Raises:
        UserError: one has another.
    """

    def verify(shard: ShardInfo) -> str:
        refuse_wrong_hash(folder / shard.file, shard.sha256)
        return shard.file

    manifest = Manifest.load(folder)
    shards = manifest.shards if manifest else []
    return prefetch(verify, shards, threads=threads, max_pending=threads)
