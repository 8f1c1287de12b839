"""Combines the parts of all tasks into one dataset.

The tokens of the parts, one after the other, are those of the single-machine run. Shards are moved,
not copied, except the first ones, which hold held-out text, and one that is cut off.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from app.data.manifest import Manifest, ShardInfo, remove_leftovers
from app.data.shards import ShardFile, Split, open_shard, shard_name
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.files import fsync_folder
from app.prepare.shard_writer import MAX_LEFT_OUT
from app.prepare.spec import DatasetSpec


@dataclass(frozen=True)
class _Stretch:
    """Tokens [begin, end) of the stream; the shard holding them starts at stream token `at`."""

    path: Path
    shard: ShardInfo
    at: int
    begin: int
    end: int

    def cut(self, begin: int, end: int) -> "_Stretch":
        """Return its intersection with [begin, end); false if that is empty."""
        return replace(self, begin=max(begin, self.begin), end=min(end, self.end))

    def __bool__(self) -> bool:
        return self.begin < self.end

    def documents(self) -> int:
        """Return how many documents begin in the stretch."""
        if self.end - self.begin == self.shard.tokens:
            return self.shard.documents
        return int(np.count_nonzero(self.tokens() == END_OF_TEXT))

    def tokens(self) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
        """Read the tokens, uint16 [end - begin]."""
        return open_shard(self.path)[self.begin - self.at : self.end - self.at]


class Stream:
    """The tokens of consecutive parts.

    Args:
        parts: their folders, in the order of their tasks.
        spec: the dataset to make.

    Attributes:
        tokens: number of tokens in all parts
        start, end: the training tokens, as far as the parts have them
        between: tokens left out between the held-out and the training tokens
        full: True if the parts have all requested tokens
        bad, rows: number of bad lines and files, and of all
        left_out: the first of the bad ones

    Raises:
        UserError: a part is damaged.
    """

    def __init__(self, parts: Sequence[Path], spec: DatasetSpec) -> None:
        self._stretches: list[_Stretch] = []
        self._counts = Counter[str]()
        self.tokens = 0
        left_out: list[str] = []
        for folder in parts:
            manifest = Manifest.load(folder)
            if manifest is None:
                raise UserError(
                    f"{folder} is damaged: it has no manifest",
                    "delete it, and run the same command again",
                )
            self._counts.update(manifest.counts)
            left_out += manifest.left_out
            for shard in manifest.shards:
                at, self.tokens = self.tokens, self.tokens + shard.tokens
                self._stretches.append(_Stretch(folder / shard.file, shard, at, at, self.tokens))
        self.bad = self._counts["bad"]
        self.rows = self._counts["documents"] + self._counts["skipped"] + self.bad
        self.left_out = tuple(left_out[:MAX_LEFT_OUT])
        self._spec = spec
        held_out, total = spec.held_out_tokens, spec.total_tokens
        self.start = self._next_document(held_out) if held_out else 0
        self.end = min(self.start + total, self.tokens) if total else self.tokens
        self.between = self.start - held_out
        self.full = self.end - self.start == total

    def write(self, folder: Path, name: str, manifest: Manifest) -> Manifest:
        """Write the dataset; a run that was stopped on the way can be repeated.

        Args:
            name: the beginning of the shards' names.
            manifest: the dataset's manifest, still without shards.
        """
        shards: list[ShardInfo] = []
        held_out, size = self._spec.held_out_tokens, self._spec.shard_size
        for at in range(0, held_out, size):
            shard_end = min(at + size, held_out)
            target = folder / shard_name(name, "val", len(shards))
            shards.append(_written(target, "val", filter(None, self._cut(at, shard_end))))
        for number, stretch in enumerate(filter(None, self._cut(self.start, self.end))):
            target = folder / shard_name(name, "train", number)
            # The first one stays in its part: a repeated run searches it for its first document.
            is_searched = held_out and stretch.begin == self.start
            if stretch.end - stretch.begin < stretch.shard.tokens or is_searched:
                shards.append(_written(target, "train", [stretch]))
                continue
            if stretch.path.exists():
                stretch.path.replace(target)
            shards.append(replace(stretch.shard, file=target.name))
        fsync_folder(folder)
        remove_leftovers(folder, name, shards)
        counts = {**self._counts, "documents": sum(shard.documents for shard in shards)}
        if self.between > 0:
            counts["between"] = self.between
        complete = replace(
            manifest, shards=tuple(shards), counts=counts, left_out=self.left_out, complete=True
        )
        complete.save(folder)
        return complete

    def _next_document(self, at: int) -> int:
        for stretch in filter(None, self._cut(at, self.tokens)):
            starts = np.flatnonzero(stretch.tokens() == END_OF_TEXT)
            if starts.size:
                return stretch.begin + int(starts[0])
        return max(at, self.tokens)

    def _cut(self, begin: int, end: int) -> list[_Stretch]:
        return [stretch.cut(begin, end) for stretch in self._stretches]


def _written(path: Path, split: Split, stretches: Iterable[_Stretch]) -> ShardInfo:
    parts = list(stretches)
    with ShardFile(path, sum(part.end - part.begin for part in parts)) as shard:
        for part in parts:
            shard.write(part.tokens())
        sha256 = shard.commit()
    documents = sum(part.documents() for part in parts)
    return ShardInfo(path.name, split, shard.tokens, documents, sha256)
