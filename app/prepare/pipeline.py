"""Documents to token shards: the held-out tokens first, then exactly the training tokens asked for.

This module and what it imports never import torch: preparing needs no GPU machine.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.data.dataset import open_dataset
from app.data.manifest import MANIFEST, Manifest, remove_leftovers
from app.data.tokenizer import VOCABULARY
from app.errors import ExitCode, Stopped, UserError
from app.files import locked
from app.prefetch import prefetch
from app.prepare.documents import Batch, Documents, batches
from app.prepare.encoder import DocumentEncoder
from app.prepare.shard_writer import EncodedBatch, ShardWriter
from app.prepare.sources import TextSource, is_hub_id, open_documents
from app.progress import TokenProgress
from app.signals import exit_code_of, exit_now, on_stop_signals, print_in_handler

_LONGEST_END_SECONDS = 15.0


class TooLittleText(UserError):
    """The whole source is less than what was asked for."""


def prepare(
    source: TextSource,
    out_dir: Path,
    *,
    name: str,
    total_tokens: int | None = None,
    val_tokens: int = 0,
    shard_size: int = 100_000_000,
    workers: int = 1,
    hf_token: str | None = None,
) -> Manifest:
    """Write a dataset's shards and manifest to `out_dir`.

    Args:
        source, hf_token: see app.prepare.sources.open_documents.
        name: what the shards' names begin with.
        total_tokens: training tokens; None for all.
        val_tokens: held-out tokens, before the training ones; one more is kept, the last target.
        shard_size: tokens of each shard but the last of a split.
        workers: threads that tokenize; they do not change the bytes.

    Raises:
        UserError: what was asked for cannot be done; nothing complete is lost.
        NetworkError: the hub or the vocabulary cannot be reached.
        Stopped: by a signal.
    """
    settings = settings_of_bytes(source, total_tokens, val_tokens, shard_size)
    out_dir.mkdir(parents=True, exist_ok=True)
    with stoppable(out_dir), locked(out_dir, "prepare"):
        previous = Manifest.load(out_dir)
        if previous is None:
            refuse_foreign_shards(out_dir)
        else:
            if is_hub_id(source.dataset) and "dataset" not in previous.settings:
                raise UserError(
                    f"there is no file or folder {source.dataset} here, and {out_dir} was "
                    "prepared from files",
                    "go to where they are, or set PREPARE_OUT_DIR to another folder",
                )
            check_matches(out_dir, previous.settings, settings)
            if previous.complete and is_hub_id(source.dataset):
                return already_complete(out_dir, previous)
            # The commit that a branch named at the beginning stays the source.
            source = replace(source, revision=previous.source.get("revision", source.revision))
        documents = open_documents(source, hf_token)
        if previous is not None:
            check_matches(out_dir, previous.source, documents.source)
            if previous.complete:
                return already_complete(out_dir, previous)
        encoder = DocumentEncoder()
        if previous is not None and previous.shards:
            # A folder of local files may have another name by now.
            name = previous.shards[0].dataset_name
        manifest = previous or new_manifest(documents, settings)
        remove_leftovers(out_dir, name, manifest.shards)
        manifest.save(out_dir)
        if manifest.shards:
            tokens = manifest.tokens("val") + manifest.tokens("train")
            print(f"{out_dir}: continues after {tokens:,} tokens", flush=True)
        writer = ShardWriter(out_dir, name, manifest)
        try:
            with writer:
                return _write(documents, encoder, writer, out_dir, workers)
        except UserError as error:
            if isinstance(error, TooLittleText) or not writer.manifest.shards:
                # The fix makes it another dataset, which would be refused.
                replace(manifest, shards=(), position=None).save(out_dir)
                remove_leftovers(out_dir, name, ())
                (out_dir / MANIFEST).unlink()
            raise


def settings_of_bytes(
    source: TextSource, total_tokens: int | None, val_tokens: int, shard_size: int
) -> dict[str, Any]:
    """Return those of prepare's arguments that determine the dataset's bytes."""
    total = total_tokens or "all"
    return {
        **source.settings,
        "total_tokens": total,
        "val_tokens": val_tokens,
        "shard_size": shard_size,
    }


def new_manifest(documents: Documents, settings: dict[str, Any]) -> Manifest:
    """The manifest of a dataset that has no shard yet."""
    tokenizer = {"name": "gpt2", "vocab_bpe_sha256": VOCABULARY["vocab.bpe"]}
    return Manifest(source=dict(documents.source), tokenizer=tokenizer, settings=settings)


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """End the block with Stopped when a signal comes."""
    code = ExitCode.SIGINT
    kept = f"{folder} is incomplete; the same command continues"

    def ask(number: int) -> None:
        nonlocal code
        code = exit_code_of(number)
        # No library takes this one for an error that it could retry.
        raise KeyboardInterrupt

    def end_now(number: int) -> None:
        print_in_handler(f"stopped: {kept}")
        exit_now(number)

    try:
        # Whatever keeps a thread: nothing is lost by an end at any moment.
        with on_stop_signals(ask, limit_seconds=_LONGEST_END_SECONDS, time_out=end_now):
            yield
    except KeyboardInterrupt:
        raise Stopped(code, kept) from None


def _write(
    documents: Documents,
    encoder: DocumentEncoder,
    writer: ShardWriter,
    folder: Path,
    workers: int,
) -> Manifest:
    def encode(batch: Batch) -> EncodedBatch:
        return EncodedBatch(batch, *encoder.encode(batch.texts()))

    held_out, total = writer.held_out, writer.total
    limit = None if total is None else total + held_out
    with (
        closing(documents.pieces(writer.cursor.position)) as pieces,
        closing(
            prefetch(encode, batches(pieces), threads=workers, max_pending=2 * workers)
        ) as encoded,
        TokenProgress(limit, done=sum(writer.taken.values())) as progress,
    ):
        while not writer.full and (batch := next(encoded, None)):
            writer.write(batch)
            progress.show(sum(writer.taken.values()), batch.fraction)
    refuse_too_little(
        writer.taken["val"], writer.taken["train"], writer.cursor.between, held_out=held_out
    )
    manifest = writer.finish()
    if total is not None and writer.taken["train"] < total:
        print(
            f"the dataset ended after {writer.taken['train']:,} of {total:,} training tokens",
            flush=True,
        )
    print(summary(folder, manifest), flush=True)
    return manifest


def refuse_too_little(val: int, train: int, between: int, *, held_out: int) -> None:
    """Raise TooLittleText if there is less than is held out, or nothing left to train on.

    Args:
        val, train, between: tokens of the splits, and left out between them.
        held_out: tokens that `val` should be.
    """
    if val < held_out:
        raise TooLittleText(
            f"the dataset has only {val:,} tokens, {held_out - 1:,} were to be held out",
            "lower PREPARE_VAL_TOKENS (0 holds nothing out), or add text",
        )
    if train == 0:
        after = f" after the {held_out:,} held-out tokens" if held_out else ""
        raise TooLittleText(
            f"the dataset has no text to train on{after}",
            "what follows them in the same document is not trained on: split the text into more "
            "documents, or set PREPARE_VAL_TOKENS to 0"
            if between
            else "check PREPARE_TEXT_COLUMN, lower PREPARE_VAL_TOKENS, or add text",
        )


def summary(folder: Path, manifest: Manifest) -> str:
    """A line that says what a complete dataset holds."""
    left_out = manifest.counts.get("skipped", 0)
    between = manifest.counts.get("between", 0)
    replaced = manifest.counts.get("not_utf8", 0)
    return (
        f"{folder}: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} held-out "
        f"tokens of {manifest.counts['documents']:,} documents in {len(manifest.shards)} shards"
        + (f"; {left_out:,} documents without text left out" if left_out else "")
        + (f"; {between:,} tokens between held-out and training text left out" if between else "")
        + (f"; {replaced:,} files with bytes that are not UTF-8, replaced" if replaced else "")
    )


def already_complete(folder: Path, manifest: Manifest) -> Manifest:
    """Check that the shards are there, and say so."""
    open_dataset(folder)
    print(f"complete already: {summary(folder, manifest)}", flush=True)
    return manifest


def refuse_foreign_shards(folder: Path) -> None:
    """Raise UserError if a folder without a manifest holds shards."""
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds shards that prepare did not write (there is no {MANIFEST})",
            "set PREPARE_OUT_DIR to another folder; train can use these shards as they are",
        )


def check_matches(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError that names what a folder was prepared from, or with, and is not now."""
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
