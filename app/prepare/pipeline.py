"""Documents to token shards: the held-out tokens first, then exactly the requested training tokens.

This module and those that it imports never import torch: preparing needs no GPU machine.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from app.data.dataset import open_dataset
from app.data.manifest import MANIFEST, Manifest, remove_leftovers
from app.data.tokenizer import VOCABULARY
from app.dataset_names import is_hub_id
from app.errors import AppError, ExitCode, Stopped, UserError
from app.formats import differences, plural
from app.locks import locked
from app.prefetch import prefetch
from app.prepare.documents import Batch, Documents, RowChunk, batches
from app.prepare.encoded_batch import EncodedBatch
from app.prepare.encoder import DocumentEncoder
from app.prepare.enough_text import TooLittleText, check_enough_text
from app.prepare.held_out import Cut, find_cut
from app.prepare.local_files import FileDocuments
from app.prepare.read_files import SOURCES, ReadFiles, checked
from app.prepare.shard_writer import ShardWriter, Task
from app.prepare.sources import check_heads, open_documents
from app.prepare.spec import DatasetSpec
from app.progress import TokenProgress
from app.signals import exit_code_of, exit_now, on_stop_signals, print_in_handler

_MAX_STOP_SECONDS = 15.0
_MAX_PENDING_TASKS = 8


def prepare(
    spec: DatasetSpec, folder: Path, *, workers: int = 1, hf_token: str | None = None
) -> Manifest:
    """Write a dataset's shards and manifest, or continue where an earlier process stopped.

    Args:
        workers: threads that tokenize; they do not change the bytes.
        hf_token: access token for private and gated Hub datasets.

    Raises:
        UserError: the dataset cannot be prepared like this; no complete shard is lost.
        NetworkError: the hub or the vocabulary cannot be reached.
        Stopped: a signal stopped it.
    """
    with preparing(folder):
        manifest, documents = resume(spec, folder, hf_token)
        if documents is None:
            return manifest
        encoder = DocumentEncoder()
        if manifest.shards:
            # A folder of local files may have been renamed since.
            spec = replace(spec, name=manifest.shards[0].dataset_name)
        remove_leftovers(folder, spec.name, manifest.shards)
        manifest.save(folder)
        if manifest.shards:
            tokens = manifest.tokens("val") + manifest.tokens("train")
            print(f"{folder}: continues after {tokens:,} tokens", flush=True)
        cut = begun_cut(manifest) if manifest.shards else find_cut(spec, documents, encoder)
        spec = with_cut(spec, cut)
        read_files = None
        if isinstance(documents, FileDocuments) and documents.filesystem is None:
            read_files = ReadFiles(folder, documents, manifest.position or {})
        writer = ShardWriter(folder, spec, manifest, read_files, cut)
        taken = writer.taken
        total = spec.total_tokens and spec.total_tokens + spec.held_out_tokens
        try:
            with writer, TokenProgress(total, done=sum(taken.values())) as progress:
                chunks = documents.chunks(writer.cursor.position)
                write_documents(chunks, encoder, writer, workers, progress, cut)
                writer.check_bad()
                cursor = writer.cursor
                check_enough_text(spec, taken["val"], taken["train"], cursor.between, cursor.bad)
                complete = writer.finish()
        except UserError as error:
            if isinstance(error, TooLittleText) or not writer.manifest.shards:
                # The remedy changes the dataset, and this folder would refuse to hold another one.
                replace(manifest, shards=(), position=None).save(folder)
                remove_leftovers(folder, spec.name, ())
                (folder / MANIFEST).unlink()
                (folder / SOURCES).unlink(missing_ok=True)
            raise
        if spec.total_tokens and taken["train"] < spec.total_tokens:
            print(
                f"the dataset ended after {taken['train']:,} of {spec.total_tokens:,} "
                "training tokens",
                flush=True,
            )
        if cut:
            print(cut.message, flush=True)
        print(summary(folder, complete), flush=True)
        return complete


def write_documents(
    chunks: Generator[RowChunk],
    encoder: DocumentEncoder,
    writer: ShardWriter,
    workers: int,
    progress: TokenProgress | None = None,
    cut: Cut | None = None,
) -> None:
    """Encode rows in `workers` threads, and write them in one more, until the writer is full."""

    def encode(batch: Batch) -> EncodedBatch:
        texts = batch.texts()
        row = cut.row_in(batch) if cut else None
        if cut is None or row is None:
            return EncodedBatch(batch, *encoder.encode(texts.rows), texts)
        tokens, lengths = encoder.encode(cut.split(texts.rows, row))
        first = int(lengths[row])
        lengths[row + 1] += first
        return EncodedBatch(batch, tokens, np.delete(lengths, row), texts, (row, first))

    def tasks() -> Iterator[Task]:
        while not writer.full and (batch := next(encoding, None)):
            yield from writer.cut(batch)
            if progress:
                progress.show(sum(writer.taken.values()), batch.fraction)

    encoding = prefetch(encode, batches(chunks), threads=workers, max_pending=2 * workers)
    # A stopped process still writes what is encoded.
    writing = prefetch(writer.run, tasks(), threads=1, max_pending=_MAX_PENDING_TASKS, finish=True)
    with closing(chunks), closing(encoding), closing(writing):
        for _ in writing:
            pass


@contextmanager
def preparing(folder: Path) -> Iterator[None]:
    """Lock a dataset's folder, and end the block with Stopped when a signal comes."""
    code = ExitCode.SIGINT
    kept = f"{folder} is incomplete; the same command continues"

    def interrupt(number: int) -> None:
        nonlocal code
        code = exit_code_of(number)
        # No library mistakes this exception for an error to retry.
        raise KeyboardInterrupt

    def end_now(number: int) -> None:
        print_in_handler(f"stopped: {kept}")
        exit_now(number)

    made = [place for place in (folder, *folder.parents) if not place.exists()]
    is_ours = False
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # A thread may be stuck; ending at any moment loses nothing.
        with (
            on_stop_signals(interrupt, limit_seconds=_MAX_STOP_SECONDS, time_out=end_now),
            locked(folder, "prepare"),
        ):
            is_ours = True
            # Another process, which failed, may just have removed it.
            folder.mkdir(parents=True, exist_ok=True)
            yield
    except (KeyboardInterrupt, AppError, OSError) as error:
        # A folder that holds nothing would look like a dataset.
        if made and is_ours and [path.name for path in folder.iterdir()] == [".lock"]:
            kept = "nothing was prepared yet"
            with suppress(OSError):
                (folder / ".lock").unlink()
                for place in made:
                    place.rmdir()
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(code, kept) from None
        raise


def resume(
    spec: DatasetSpec,
    folder: Path,
    hf_token: str | None,
    while_incomplete: Mapping[str, Any] | None = None,
) -> tuple[Manifest, Documents | None]:
    """Return the manifest to continue from, and the documents; None if the dataset is complete.

    Args:
        while_incomplete: further settings that the manifest has until the dataset is complete.

    Raises:
        UserError: the folder holds a different dataset, there is no such source, or it has files
            that are not text.
        NetworkError: the hub does not answer.
    """
    source, extra = spec.source, while_incomplete or {}
    previous = Manifest.load(folder)
    if previous is None:
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{folder} holds shards that prepare did not write (there is no {MANIFEST})",
                "set PREPARE_OUT_DIR to another folder; train can use these shards as they are",
            )
    else:
        if is_hub_id(source.dataset) and "dataset" not in previous.settings:
            raise UserError(
                f"there is no file or folder {source.dataset} here, and {folder} was prepared "
                "from files",
                "go to where they are, or set PREPARE_OUT_DIR to another folder",
            )
        settings = spec.settings if previous.complete else {**spec.settings, **extra}
        if "held_out" not in previous.settings:
            # Datasets of earlier versions remain what the same command prepares.
            settings = {name: it for name, it in settings.items() if name != "held_out"}
        check_matches(folder, previous.settings, settings)
        if previous.complete and is_hub_id(source.dataset):
            return _already_complete(folder, previous), None
        # The dataset stays at the commit that the branch named when it was begun.
        source = replace(source, revision=previous.source.get("revision", source.revision))
    documents = open_documents(source, hf_token)
    if previous is None:
        manifest = new_manifest(documents, {**spec.settings, **extra})
    elif isinstance(documents, FileDocuments) and (folder / SOURCES).exists():
        identities = [dict(identity) for identity in (previous.source, documents.source)]
        for identity in identities:
            for name in ("files", "listing", "removed"):
                identity.pop(name, None)
        check_matches(folder, *identities)
        manifest = checked(folder, previous, documents)
    else:
        check_matches(folder, previous.source, documents.source)
        manifest = previous
    if previous and previous.complete:
        return _already_complete(folder, previous), None
    if isinstance(documents, FileDocuments):
        if documents.own:
            own = ", ".join(documents.own)
            print(f"no text is read from this program's own folders: {own}", flush=True)
        if not spec.skip_bad:
            check_heads(documents)
    return manifest, documents


def new_manifest(documents: Documents, settings: dict[str, Any]) -> Manifest:
    """Return the manifest of a dataset that has no shard yet."""
    tokenizer = {"name": "gpt2", "vocab_bpe_sha256": VOCABULARY["vocab.bpe"]}
    return Manifest(source=dict(documents.source), tokenizer=tokenizer, settings=settings)


def begun_cut(manifest: Manifest) -> Cut | None:
    """Return the cut with which a dataset was begun; without one, held-out text ends as usual."""
    position = manifest.position or {}
    cut = Cut.load(position.get("cut"))
    if cut and manifest.tokens("val") == cut.tokens and not position["token"]:
        # Nothing of the document that was cut is read again, and a removed file's place is taken.
        return replace(cut, bytes=0)
    return cut


def with_cut(spec: DatasetSpec, cut: Cut | None) -> DatasetSpec:
    """Return the spec with as many held-out tokens as the cut has."""
    return replace(spec, val_tokens=cut.tokens - 1) if cut else spec


def summary(folder: Path, manifest: Manifest) -> str:
    """Return a line that describes a complete dataset."""
    counts, num_shards = manifest.counts, len(manifest.shards)
    left_out = {
        "skipped": (("row",), "without text left out"),
        "between": (("token",), "between held-out and training text left out"),
        "not_utf8": (("document",), "with characters that have no UTF-8, replaced"),
        "bad": (("bad line or file", "bad lines and files"), f"left out, named in {MANIFEST}"),
    }
    tokens = (
        f"{folder}: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} "
        f"held-out tokens of {plural(counts['documents'], 'document')} in "
        f"{plural(num_shards, 'shard')}"
    )
    others = [
        f"{plural(counts[key], *nouns)} {what}"
        for key, (nouns, what) in left_out.items()
        if counts.get(key)
    ]
    return "; ".join([tokens, *others])


def _already_complete(folder: Path, manifest: Manifest) -> Manifest:
    open_dataset(folder)
    print(f"complete already: {summary(folder, manifest)}", flush=True)
    return manifest


def check_matches(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if the source or settings of a folder have changed; names each difference."""
    changes = differences(before, now)
    if "listing" in changes:
        changes["listing"] = "the files have changed"
    if changes:
        raise UserError(
            f"{folder} was prepared differently: {'; '.join(changes.values())}",
            "set PREPARE_OUT_DIR to another folder, or delete this one to prepare it anew",
        )
