"""The parts of all tasks become one dataset.

Their tokens, one part after the other, are the stream of the single-machine run. Shards are moved,
not copied, but for the first ones, which hold text that is held out, and one that is cut off.
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


@dataclass(frozen=True)
class _Stretch:
    """Tokens [begin, end) of the stream, or those of them that are wanted, in one shard."""

    path: Path
    shard: ShardInfo
    at: int
    begin: int
    end: int

    def cut(self, begin: int, end: int) -> "_Stretch":
        """Return the part of it in [begin, end); empty if its end is not after its begin."""
        return replace(self, begin=max(begin, self.begin), end=min(end, self.end))

    def __bool__(self) -> bool:
        return self.begin < self.end

    def documents(self) -> int:
        """Return how many documents begin in it."""
        if self.end - self.begin == self.shard.tokens:
            return self.shard.documents
        return int(np.count_nonzero(self.tokens() == END_OF_TEXT))

    def tokens(self) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
        """uint16 [end - begin]."""
        return open_shard(self.path)[self.begin - self.at : self.end - self.at]


class Stream:
    """The tokens of consecutive parts.

    Args:
        parts: their folders, in the order of their tasks.
        wanted: the settings of the dataset's manifest.

    Attributes:
        held_out: tokens of the held-out split, with the last target
        start, end: the training tokens that are wanted, as far as there are any
        tokens: of all parts
        full: whether these are all that were asked for

    Raises:
        UserError: a part is damaged.
    """

    def __init__(self, parts: Sequence[Path], wanted: dict[str, int | str]) -> None:
        self._stretches: list[_Stretch] = []
        self._counts = Counter[str]()
        self.tokens = 0
        for folder in parts:
            manifest = Manifest.load(folder)
            if manifest is None:
                raise UserError(
                    f"{folder} is damaged: it has no manifest",
                    "delete it, and give the same command again",
                )
            self._counts.update(manifest.counts)
            for shard in manifest.shards:
                at, self.tokens = self.tokens, self.tokens + shard.tokens
                self._stretches.append(_Stretch(folder / shard.file, shard, at, at, self.tokens))
        self._shard_size = int(wanted["shard_size"])
        self.held_out = int(wanted["val_tokens"]) + 1 if wanted["val_tokens"] else 0
        total = wanted["total_tokens"]
        self.start = self._next_document(self.held_out) if self.held_out else 0
        self.end = self.tokens if total == "all" else min(self.start + int(total), self.tokens)
        self.full = total != "all" and self.end - self.start == int(total)

    def write(self, folder: Path, name: str, manifest: Manifest) -> Manifest:
        """Make the dataset, and its manifest complete; does what is left if it was stopped before.

        Args:
            manifest: the incomplete one, with the dataset's settings.
        """
        shards: list[ShardInfo] = []
        for at in range(0, self.held_out, self._shard_size):
            shard_end = min(at + self._shard_size, self.held_out)
            target = folder / shard_name(name, "val", len(shards))
            shards.append(_written(target, "val", filter(None, self._cut(at, shard_end))))
        for number, stretch in enumerate(filter(None, self._cut(self.start, self.end))):
            target = folder / shard_name(name, "train", number)
            # The one that training begins in is looked for in its part, another time as well.
            is_rank_zero = self.held_out and stretch.begin == self.start
            if stretch.end - stretch.begin < stretch.shard.tokens or is_rank_zero:
                shards.append(_written(target, "train", [stretch]))
                continue
            if stretch.path.exists():
                stretch.path.replace(target)
            shards.append(replace(stretch.shard, file=target.name))
        fsync_folder(folder)
        remove_leftovers(folder, name, shards)
        counts = {**self._counts, "documents": sum(shard.documents for shard in shards)}
        if self.start > self.held_out:
            counts["between"] = self.start - self.held_out
        complete = replace(manifest, shards=tuple(shards), counts=counts, complete=True)
        complete.save(folder)
        return complete

    def _next_document(self, at: int) -> int:
        for stretch in filter(None, self._cut(at, self.tokens)):
            starts = np.flatnonzero(stretch.tokens() == END_OF_TEXT)
            if starts.size:
                return stretch.begin + int(starts[0])
        return max(at, self.tokens)

    def _cut(self, begin: int, end: int) -> list[_Stretch]:
        return [one.cut(begin, end) for one in self._stretches]


def _written(path: Path, split: Split, stretches: Iterable[_Stretch]) -> ShardInfo:
    found = list(stretches)
    with ShardFile(path, sum(one.end - one.begin for one in found)) as shard:
        for one in found:
            shard.write(one.tokens())
        sha256 = shard.commit()
    documents = sum(one.documents() for one in found)
    return ShardInfo(path.name, split, shard.tokens, documents, sha256)
