"""The manifest of a dataset folder: which shards it has, of which text, and their hashes."""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from app.data.shards import Split, Tokens, open_shard
from app.errors import UserError
from app.files import PARTIAL, read_json, sha256_of, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry of a shard; `documents` begin in it."""

    file: str
    split: Split
    tokens: int
    documents: int
    sha256: str

    @property
    def dataset_name(self) -> str:
        """Return the dataset name that shard_name was given."""
        stem = self.file.rpartition("_")[0]
        return stem.removesuffix("_val") if self.split == "val" else stem


@dataclass(frozen=True)
class Manifest:
    """The contents of a dataset folder, their source, and whether they are complete.

    Attributes:
        source: what identifies the documents
        tokenizer: name and the hash of the vocabulary
        settings: what else determines the bytes
        counts: documents that were encoded, and what was left out or replaced
        position: where the next shard begins in the source, until the dataset is complete
    """

    source: dict[str, Any]
    tokenizer: dict[str, str]
    settings: dict[str, Any]
    shards: tuple[ShardInfo, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    position: dict[str, int] | None = None
    complete: bool = False

    def tokens(self, split: Split) -> int:
        """Tokens of a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest atomically."""
        totals = {"train_tokens": self.tokens("train"), "val_tokens": self.tokens("val")}
        value = {"format_version": FORMAT_VERSION, **asdict(self), "totals": totals}
        if self.position is None:
            del value["position"]
        write_json(folder / MANIFEST, value)

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """Read a folder's manifest; None if it has none.

        Raises:
            UserError: it is damaged or of another version.
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
            known = {item.name: value[item.name] for item in fields(cls) if item.name != "shards"}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}", fix) from None
        return cls(shards=shards, **known)


def remove_leftovers(folder: Path, name: str, shards: Collection[ShardInfo]) -> None:
    """Delete what a killed process has left: half a file, or a shard `name` besides `shards`.

    Raises:
        UserError: one of `shards` is missing or of another size.
    """
    for shard in shards:
        refuse_other_size(folder, shard, open_shard(folder / shard.file))
    kept = {shard.file for shard in shards}
    ours = rf"{re.escape(name)}_(val_)?\d{{6}}\.bin({re.escape(PARTIAL)})?"
    for path in folder.iterdir():
        left = path.name == MANIFEST + PARTIAL or re.fullmatch(ours, path.name)
        if left and path.name not in kept:
            path.unlink()


def refuse_other_size(folder: Path, shard: ShardInfo, tokens: Tokens) -> None:
    """Raise UserError if a shard has not as many tokens as the manifest says."""
    if tokens.size != shard.tokens:
        raise UserError(
            f"shard {folder / shard.file} has {tokens.size} tokens, {MANIFEST} says {shard.tokens}",
            "prepare the dataset again in an empty folder",
        )


def refuse_wrong_hash(path: Path, sha256: str) -> None:
    """Raise UserError if a file's SHA-256 is not the one given."""
    try:
        found = sha256_of(path)
    except OSError as error:
        raise UserError(
            f"shard {path} cannot be read: {error.strerror}",
            "put it back, or prepare the dataset again",
        ) from None
    if found != sha256:
        raise UserError(
            f"shard {path} is damaged: its SHA-256 is {found}, {MANIFEST} says {sha256}",
            "delete the folder and prepare the dataset again",
        )
