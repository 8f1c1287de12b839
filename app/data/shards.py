"""Token shards and the manifest that says what they hold.

A shard is llm.c's format for GPT-2 tokens (Karpathy, llm.c, dev/data/data_common.py): 256
little-endian int32, of which the first three are magic, version and token count, then that many
little-endian uint16 tokens.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from app.containers import program
from app.data.ahead import ahead
from app.errors import UserError
from app.files import PARTIAL, atomic_file, named, read_json, write_json

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MANIFEST = "manifest.json"
FORMAT_VERSION = 1

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.uint16]


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


def shard_name(name: str, split: Split, index: int) -> str:
    """File name of a shard: fineweb_000000.bin, fineweb_val_000000.bin."""
    return f"{name}_{'val_' if split == 'val' else ''}{index:06d}.bin"


def remove_leftovers(folder: Path, name: str, shards: Collection[ShardInfo]) -> None:
    """Delete what a killed process has left: half a file, or a shard `name` besides `shards`.

    Raises:
        UserError: one of `shards` is missing or of another size.
    """
    for shard in shards:
        _refuse_other_size(folder, shard, open_shard(folder / shard.file))
    kept = {shard.file for shard in shards}
    ours = rf"{re.escape(name)}_(val_)?\d{{6}}\.bin({re.escape(PARTIAL)})?"
    for path in folder.iterdir():
        left = path.name == MANIFEST + PARTIAL or re.fullmatch(ours, path.name)
        if left and path.name not in kept:
            path.unlink()


def _refuse_other_size(folder: Path, shard: ShardInfo, tokens: Tokens) -> None:
    if tokens.size != shard.tokens:
        raise UserError(
            f"shard {folder / shard.file} has {tokens.size} tokens, {MANIFEST} says {shard.tokens}",
            "prepare the dataset again in an empty folder",
        )


class ShardFile:
    """A shard that is written piece by piece, and takes its name when it is committed.

    As a context manager it leaves nothing behind that was not.

    Args:
        expected: tokens that will come. With another number the shard is as right, but is read
            again for its hash.

    Attributes:
        path: the name that it takes
        tokens: written so far
    """

    def __init__(self, path: Path, expected: int) -> None:
        self.path = path
        self.tokens = 0
        self._expected = expected
        self._ending = ExitStack()
        self._file = self._ending.enter_context(atomic_file(path))
        self._digest = hashlib.sha256()
        self._put(_header(expected))

    def write(self, tokens: Tokens) -> None:
        """Append uint16 tokens [count]."""
        self._put(np.ascontiguousarray(tokens, "<u2").data)
        self.tokens += tokens.size

    def commit(self) -> str:
        """Complete the shard; returns its SHA-256."""
        with self._ending:
            if self.tokens != self._expected:
                self._file.seek(0)
                self._file.write(_header(self.tokens))
                self._file.seek(0)
                self._digest = hashlib.file_digest(self._file, "sha256")
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with suppress(_Discarded), self._ending:
            raise _Discarded

    def _put(self, content: bytes | memoryview) -> None:
        with named(self.path):
            self._file.write(content)
        self._digest.update(content)


class _Discarded(Exception):
    """The block that writes a file is left before its end."""


def _header(tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def open_shard(path: Path) -> Tokens:
    """Memory-map a shard's tokens, uint16 [count].

    Raises:
        UserError: the file is missing, not a shard, or not of the size its header says.
    """
    fix = "prepare the dataset again, or copy the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}", fix) from None
    if len(head) < 12:
        raise UserError(f"shard {path} is cut off: {size} bytes, its header has 1024", fix)
    magic, version, count = (int(number) for number in np.frombuffer(head, dtype="<i4"))
    if magic != MAGIC:
        raise UserError(
            f"{path} is not a token shard: it begins with {magic}, not {MAGIC}",
            "take it out of the folder, or prepare the dataset again",
        )
    if version != VERSION:
        raise UserError(
            f"shard {path} has version {version}, this program reads {VERSION} (GPT-2 tokens)", fix
        )
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"shard {path} has {size} bytes; its header says {count} tokens, "
            f"which take {HEADER_BYTES + 2 * count}",
            fix,
        )
    if count == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def verified(folder: Path, threads: int) -> Iterator[str]:
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
    return ahead(verify, shards, threads=threads, waiting=threads)


def refuse_wrong_hash(path: Path, sha256: str) -> None:
    """Raise UserError if a file's SHA-256 is not the one given."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
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
            _refuse_other_size(folder, shard, opened[shard.file])
        listing = "".join(f"{shard.file}\t{shard.sha256}\n" for shard in manifest.shards)
        held_out = {shard.file for shard in manifest.shards if shard.split == "val"}
    return Dataset(
        folder,
        train=[tokens for name, tokens in opened.items() if name not in held_out],
        val=[tokens for name, tokens in opened.items() if name in held_out],
        fingerprint=hashlib.sha256(listing.encode()).hexdigest(),
    )
