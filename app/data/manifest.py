"""The manifest of a dataset folder: its shards, their hashes, and the text they were made from."""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from app.data.shards import Shard, Split, open_shard
from app.errors import UserError
from app.files import PARTIAL, read_json, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry of a shard; `documents` counts the documents that begin in it."""

    file: str
    split: Split
    tokens: int
    documents: int
    sha256: str

    @property
    def dataset_name(self) -> str:
        """Return the dataset name, the prefix of the shard's file name; see shard_name."""
        stem = self.file.rpartition("_")[0]
        return stem.removesuffix("_val") if self.split == "val" else stem


@dataclass(frozen=True)
class Manifest:
    """The contents of a dataset folder.

    Attributes:
        source: identifies the documents
        tokenizer: name, and hash of the vocabulary
        settings: the other values that determine the bytes
        shards: in order, the held-out ones first
        counts: documents encoded, and documents, tokens and bytes left out or replaced
        left_out: the first of the bad rows and files that PREPARE_SKIP_BAD left out, and why
        position: where the next shard begins in the source, until the dataset is complete
        complete: False while prepare is writing, and after it was stopped
    """

    source: dict[str, Any]
    tokenizer: dict[str, str]
    settings: dict[str, Any]
    shards: tuple[ShardInfo, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    position: dict[str, Any] | None = None
    complete: bool = False

    def tokens(self, split: Split) -> int:
        """Return the number of tokens of a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest atomically."""
        totals = {"train_tokens": self.tokens("train"), "val_tokens": self.tokens("val")}
        value = {"format_version": FORMAT_VERSION, **asdict(self), "totals": totals}
        for name in ("left_out", "position"):
            if not value[name]:
                del value[name]
        write_json(folder / MANIFEST, value)

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """Read a folder's manifest; None if it has none.

        Raises:
            UserError: the manifest is damaged, or of another version.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        fix = "prepare the dataset again in an empty folder"
        value = read_json(path, fix)
        if value.get("format_version") != FORMAT_VERSION:
            version = value.get("format_version")
            raise UserError(
                f"{path} has format version {version}, this program reads {FORMAT_VERSION}", fix
            )
        try:
            shards = tuple(ShardInfo(**shard) for shard in value.pop("shards"))
            value.setdefault("position", None)
            value["left_out"] = tuple(value.get("left_out", ()))
            known = {item.name: value[item.name] for item in fields(cls) if item.name != "shards"}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}", fix) from None
        return cls(shards=shards, **known)


def remove_leftovers(folder: Path, name: str, shards: Collection[ShardInfo]) -> None:
    """Delete a killed process's files: partial ones, and shards of dataset `name` not in `shards`.

    Raises:
        UserError: one of `shards` is missing, or its size differs.
    """
    for shard in shards:
        open_listed_shard(folder, shard)
    kept = {shard.file for shard in shards}
    ours = rf"{re.escape(name)}_(val_)?\d{{6}}\.bin({re.escape(PARTIAL)})?"
    for path in folder.iterdir():
        is_ours = path.name == MANIFEST + PARTIAL or re.fullmatch(ours, path.name)
        if is_ours and path.name not in kept:
            path.unlink()


def open_listed_shard(folder: Path, shard: ShardInfo) -> Shard:
    """Open a shard; UserError if its count differs from the manifest."""
    opened = open_shard(folder / shard.file)
    if opened.size != shard.tokens:
        raise UserError(
            f"shard {folder / shard.file} has {opened.size} tokens, {MANIFEST} says {shard.tokens}",
            "prepare the dataset again in an empty folder",
        )
    return opened
