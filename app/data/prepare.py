"""Documents to token shards: the held-out tokens first, then exactly the training tokens asked for.

This module and what it imports never import torch: preparing needs no GPU machine.
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from app.data.batches import Documents
from app.data.documents import is_hub_id, open_documents
from app.data.progress import TokenProgress
from app.data.shards import (
    MANIFEST,
    Manifest,
    ShardInfo,
    Split,
    Tokens,
    discard_shards,
    open_dataset,
    shard_name,
    write_shard,
)
from app.data.tokenizer import VOCABULARY, Tokenizer
from app.errors import SAME_REQUEST_SECONDS, ExitCode, Stopped, UserError
from app.files import locked


@dataclass
class ShardBook:
    """The shards written so far; the manifest in the folder always lists exactly these."""

    folder: Path
    name: str
    manifest: Manifest

    def add(self, split: Split, index: int, tokens: Tokens, documents: int) -> None:
        """Write a shard and record it."""
        file = shard_name(self.name, split, index)
        sha256 = write_shard(self.folder / file, tokens)
        info = ShardInfo(file, split, tokens.size, documents, sha256)
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, info))
        self.manifest.save(self.folder)


class ShardWriter:
    """Cuts a split's stream of tokens into shards.

    At most `limit` tokens are taken; None takes all.
    """

    def __init__(self, book: ShardBook, split: Split, shard_size: int, limit: int | None) -> None:
        self.taken = 0
        self.documents = 0
        self._book, self._split, self._limit = book, split, limit
        self._buffer = np.empty(min(shard_size, limit or shard_size), dtype=np.uint16)
        self._filled = self._shards = self._documents_before = 0

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.taken == self._limit

    def write(self, tokens: Tokens, starts: npt.NDArray[np.int64]) -> int:
        """Append documents up to the limit.

        Args:
            tokens: uint16 [count]
            starts: int64 [documents], where in `tokens` each document begins

        Returns:
            How many of the documents were begun.
        """
        room = tokens.size if self._limit is None else self._limit - self.taken
        position, end = 0, min(room, tokens.size)
        while position < end:
            if self._filled == self._buffer.size:
                self.flush()
            take = min(self._buffer.size - self._filled, end - position)
            self._buffer[self._filled : self._filled + take] = tokens[position : position + take]
            begun = np.searchsorted(starts, (position, position + take))
            self.documents += int(begun[1] - begun[0])
            self._filled += take
            self.taken += take
            position += take
        return int(np.searchsorted(starts, end))

    def flush(self) -> None:
        """Write what is buffered as a shard."""
        if self._filled:
            begun = self.documents - self._documents_before
            self._book.add(self._split, self._shards, self._buffer[: self._filled], begun)
            self._documents_before = self.documents
            self._shards += 1
            self._filled = 0


def prepare(
    dataset: str,
    out_dir: Path,
    *,
    name: str,
    config: str | None = None,
    revision: str = "main",
    split: str = "train",
    text_column: str = "text",
    shuffle_files: bool = True,
    total_tokens: int | None = None,
    val_tokens: int = 0,
    shard_size: int = 100_000_000,
    workers: int = 1,
    hf_token: str | None = None,
) -> Manifest:
    """Write a dataset's shards and manifest to `out_dir`.

    Args:
        dataset, config, revision, split, text_column, shuffle_files, hf_token: see
            app.data.documents.open_documents.
        name: what the shards' names begin with.
        total_tokens: training tokens; None for all.
        val_tokens: held-out tokens, before the training ones; one more is kept, the last target.
        shard_size: tokens of each shard but the last of a split.
        workers: threads that tokenize; they do not change the bytes.

    Raises:
        UserError: what was asked for cannot be done; nothing complete is lost.
        NetworkError: the hub or the vocabulary cannot be reached.
        Stopped: by SIGINT or SIGTERM.
    """
    settings: dict[str, Any] = {
        "text_column": text_column,
        "shuffle_files": shuffle_files,
        "total_tokens": total_tokens or "all",
        "val_tokens": val_tokens,
        "shard_size": shard_size,
    }
    if is_hub_id(dataset):
        settings |= {"dataset": dataset, "config": config, "revision": revision, "split": split}
    out_dir.mkdir(parents=True, exist_ok=True)
    with _stoppable(out_dir), locked(out_dir, "prepare"):
        previous = Manifest.load(out_dir)
        if previous is None:
            _refuse_foreign_shards(out_dir)
        else:
            _refuse_difference(out_dir, previous.settings, settings)
            if previous.complete and is_hub_id(dataset):
                return _already_complete(out_dir, previous)
        documents = open_documents(
            dataset,
            config=config,
            revision=revision,
            split=split,
            text_column=text_column,
            shuffle_files=shuffle_files,
            hf_token=hf_token,
        )
        if previous is not None and previous.complete:
            _refuse_difference(out_dir, previous.source, documents.source)
            return _already_complete(out_dir, previous)
        manifest = Manifest(
            source=dict(documents.source),
            tokenizer={"name": "gpt2", "vocab_bpe_sha256": VOCABULARY["vocab.bpe"]},
            settings=settings,
        )
        tokenizer = Tokenizer(workers)
        if previous is not None:
            discard_shards(out_dir)
        manifest.save(out_dir)
        if previous is not None:
            print(f"{out_dir} was left incomplete; preparing it again from the start", flush=True)
        book = ShardBook(out_dir, name, manifest)
        try:
            return _write(documents, book, tokenizer)
        except UserError:
            # The fix changes text or settings, so that nothing of this can be continued.
            discard_shards(out_dir)
            raise


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block with Stopped."""
    asked_at: float | None = None

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            # No library takes this one for an error that it could retry.
            raise KeyboardInterrupt(number)
        if time.monotonic() - asked_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as error:
        terminated = error.args == (signal.SIGTERM,)
        raise Stopped(
            ExitCode.SIGTERM if terminated else ExitCode.SIGINT,
            f"{folder} is incomplete; the same command prepares it again",
        ) from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _write(documents: Documents, book: ShardBook, tokenizer: Tokenizer) -> Manifest:
    wanted = book.manifest.settings
    total = None if wanted["total_tokens"] == "all" else int(wanted["total_tokens"])
    # One more than the held-out windows' inputs, so that the last of them has its last target.
    held_out = wanted["val_tokens"] + 1 if wanted["val_tokens"] else 0
    val = ShardWriter(book, "val", wanted["shard_size"], held_out)
    train = ShardWriter(book, "train", wanted["shard_size"], total)
    with TokenProgress(None if total is None else total + held_out) as progress:
        for batch in documents.batches():
            tokens, lengths = tokenizer.encode_documents(batch.texts)
            starts = np.cumsum(lengths) - lengths
            if not val.full:
                first = val.write(tokens, starts)
                if val.full:
                    val.flush()
                skipped = int(starts[first]) if first < starts.size else tokens.size
                tokens, starts = tokens[skipped:], starts[first:] - skipped
            train.write(tokens, starts)
            progress.show(val.taken + train.taken, batch.fraction)
            if train.full:
                break
    if not val.full:
        raise UserError(
            f"the dataset has only {val.taken:,} tokens, "
            f"{wanted['val_tokens']:,} were to be held out",
            "lower PREPARE_VAL_TOKENS (0 holds nothing out), or add text",
        )
    if train.taken == 0:
        raise UserError(
            "the dataset has no text to train on"
            + (f" after the {held_out:,} held-out tokens" if held_out else ""),
            "check PREPARE_TEXT_COLUMN, lower PREPARE_VAL_TOKENS, or add text",
        )
    train.flush()
    counts = {"documents": val.documents + train.documents, **documents.counts}
    manifest = replace(book.manifest, counts=counts, complete=True)
    manifest.save(book.folder)
    if total is not None and train.taken < total:
        print(f"the dataset ended after {train.taken:,} of {total:,} training tokens", flush=True)
    print(_summary(book.folder, manifest), flush=True)
    return manifest


def _summary(folder: Path, manifest: Manifest) -> str:
    left_out = manifest.counts.get("skipped", 0)
    replaced = manifest.counts.get("not_utf8", 0)
    return (
        f"{folder}: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} held-out "
        f"tokens of {manifest.counts['documents']:,} documents in {len(manifest.shards)} shards"
        + (f"; {left_out:,} documents without text left out" if left_out else "")
        + (f"; {replaced:,} files with bytes that are not UTF-8, replaced" if replaced else "")
    )


def _already_complete(folder: Path, manifest: Manifest) -> Manifest:
    open_dataset(folder)
    print(f"complete already: {_summary(folder, manifest)}", flush=True)
    return manifest


def _refuse_foreign_shards(folder: Path) -> None:
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds shards that prepare did not write (there is no {MANIFEST})",
            "set PREPARE_OUT_DIR to another folder; train can use these shards as they are",
        )


def _refuse_difference(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = [
        "the files have changed"
        if key == "listing"
        else f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in (*before, *(now.keys() - before.keys()))
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise UserError(
            f"{folder} was prepared otherwise: {'; '.join(differences)}",
            "set PREPARE_OUT_DIR to another folder, or delete this one to prepare it anew",
        )
