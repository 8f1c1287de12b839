"""A source of text, and the dataset to make from it."""

import difflib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from app.dataset_names import is_hub_id

_SEARCHED_NAMES = 10_000


def is_doubtful(dataset: str) -> bool:
    """Return True if a hub id may be a mistyped path: its owner is missing, or is a folder here."""
    return Path(dataset).parent.is_dir()


def absence(dataset: str) -> str:
    """Return the sentence that there is no such file or folder; it names similar ones."""
    folder, name = Path(dataset).parent, Path(dataset).name
    with suppress(OSError):
        names = [path.name for path in islice(folder.iterdir(), _SEARCHED_NAMES)]
        if close := difflib.get_close_matches(name, names, cutoff=0.75):
            similar = " and ".join(str(folder / one) for one in close)
            return f"there is no file or folder {dataset} here (but {similar})"
    return f"there is no file or folder {dataset} here"


@dataclass(frozen=True)
class TextSource:
    """A source of text.

    Attributes:
        dataset: `stdlib`, a local file, folder or glob, or a hub id; a folder laid out as a hub
            repository is read as one
        config, revision, split: which part of a hub dataset
        text_column: the text's name in .jsonl, .parquet and hub datasets
        shuffle_files: read local files in the order of their names' hashes, since folders are
            sorted by topic; otherwise in the order of their names
        encoding: of local text files without a byte order mark; empty for UTF-8
        own: folders below which no text is read, if they lie in `dataset`
        retry_seconds: waits between tries when the hub does not answer
    """

    dataset: str
    config: str | None = None
    revision: str = "main"
    split: str = "train"
    text_column: str = "text"
    shuffle_files: bool = True
    encoding: str = ""
    own: tuple[Path, ...] = ()
    retry_seconds: Sequence[float] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Return the fields that determine a dataset's bytes, for its manifest."""
        names = ["text_column", "shuffle_files"] + ["encoding"] * bool(self.encoding)
        if is_hub_id(self.dataset):
            names += ["dataset", "config", "revision", "split"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset to prepare.

    Attributes:
        source: its text
        name: the beginning of the shards' names
        total_tokens: training tokens; None for all
        val_tokens: held-out tokens, which come before the training tokens
        shard_size: tokens of each shard but a split's last
        skip_bad: how many bad rows and files may be left out; below 1: as a share of all
        sequence_tokens: if more than 0, little local text may hold out less than `val_tokens`: a
            twentieth, but no less than this
    """

    source: TextSource
    name: str
    total_tokens: int | None = None
    val_tokens: int = 0
    shard_size: int = 100_000_000
    skip_bad: float = 0
    sequence_tokens: int = 0

    def allows_bad(self, bad: int, rows: int) -> bool:
        """Return True if `bad` of the `rows` lines, rows and files may be left out."""
        return bad <= (self.skip_bad if self.skip_bad >= 1 else self.skip_bad * rows)

    @property
    def held_out_tokens(self) -> int:
        """Return the size of the held-out split, with one more token as the last target."""
        return self.val_tokens + 1 if self.val_tokens else 0

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the dataset's bytes, for its manifest."""
        return {
            **self.source.settings,
            "total_tokens": self.total_tokens or "all",
            "val_tokens": self.val_tokens,
            **({"held_out": "auto"} if self.sequence_tokens else {}),
            "shard_size": self.shard_size,
        }
