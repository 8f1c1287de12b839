"""Description and verification of what prepare and train wrote."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from app.data.dataset import ShardVerification, is_held_out, open_dataset, shard_files
from app.data.manifest import MANIFEST, Manifest
from app.data.shards import MAGIC, open_shard
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.runs.checkpoint import TENSOR_FILES, checkpoint_folder, open_checkpoint
from app.runs.checkpoint_state import STATE_FILE
from app.runs.checkpoints import checkpoint_steps, missing_run_error
from app.runs.code import describe_source, patch_name, read_patches
from app.runs.metrics import read_metrics
from app.settings.settings import Settings
from app.tools.latest_run import with_latest_run

_FIX = "give the path of a .bin file, or of a folder that prepare or train wrote"
_CHUNK_TOKENS = 1 << 24


def inspect(settings: Settings, *, path: str | None, verify: bool) -> None:
    """Print the description of a path, which may be relative to DATA_DIR; by default of the run.

    Raises:
        UserError: there is no such path; or see `describe`.
    """
    data_dir = settings.general.data_dir
    if path is None:
        run_dir = with_latest_run(settings).run_dir
        if not run_dir.is_dir():
            raise missing_run_error(run_dir)
        path = str(run_dir)
    for candidate in (Path(path), data_dir / path):
        if candidate.exists():
            for line in describe(candidate, verify=verify):
                print(line, flush=True)
            return
    marks = (*data_dir.glob(f"*/{MANIFEST}"), *data_dir.glob("runs/*/metrics.jsonl"))
    known = ", ".join(sorted(str(mark.parent) for mark in marks))
    raise UserError(
        f"there is no {path}, neither here nor in {data_dir}", f"{_FIX}{known and f': {known}'}"
    )


def describe(path: Path, *, verify: bool) -> Iterator[str]:
    """Describe a shard, a dataset folder, a checkpoint or a run, line by line.

    Args:
        path: one of these.
        verify: also compare every hash and check every value.

    Raises:
        UserError: the path is none of these, or a file is damaged.
    """
    if path.is_file():
        _check_is_shard(path)
        return _shard(path)
    if kind := _kind(path):
        return kind(path, verify)
    problem, fix = f"{path} is not a shard, dataset folder, checkpoint or run", _FIX
    if (path / "config.json").exists():
        problem = f"{path} is a model for transformers; only its checkpoint can be inspected"
    elif inside := [each.name for each in sorted(path.glob("*/")) if _kind(each)]:
        fix = f"give one of the folders in it: {', '.join(inside[:10])}"
    raise UserError(problem, fix)


def _kind(folder: Path) -> Callable[[Path, bool], Iterator[str]] | None:
    """Return the function that describes a folder; None if there is none."""
    if (folder / STATE_FILE).exists():
        return _checkpoint
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists():
        return _run
    is_dataset = folder.is_dir() and ((folder / MANIFEST).exists() or shard_files(folder))
    return _dataset if is_dataset else None


def _check_is_shard(path: Path) -> None:
    """Raise UserError that says what a file is, unless it is a shard, or the start of one."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(MAGIC.to_bytes(4, "little")) or (not head and path.suffix == ".bin"):
        return
    kind, fix = f"it begins with {head!r}" if head else "it is empty", _FIX
    if path.name in (STATE_FILE, *TENSOR_FILES, MANIFEST, "metrics.jsonl") and _kind(path.parent):
        kind, fix = f"it is a part of {path.parent}", f"give that folder: inspect {path.parent}"
    raise UserError(f"{path} is not a token shard: {kind}", fix)


def _shard(path: Path) -> Iterator[str]:
    tokens = open_shard(path)
    yield f"{path}: a shard of {tokens.size:,} GPT-2 tokens, {path.stat().st_size:,} bytes"
    largest = documents = 0
    for start in range(0, tokens.size, _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        largest = max(largest, int(chunk.max()))
        documents += int(np.count_nonzero(chunk == END_OF_TEXT))
    if largest > END_OF_TEXT:
        raise UserError(
            f"{path} has token {largest}, but GPT-2's vocabulary ends at {END_OF_TEXT}",
            "prepare the dataset again",
        )
    yield f"  {documents:,} documents begin in it; the largest token is {largest}"


def _dataset(path: Path, verify: bool) -> Iterator[str]:
    manifest = Manifest.load(path)
    if manifest is None:
        yield f"{path}: shards without a {MANIFEST}, as llm.c writes them"
        for file in shard_files(path):
            yield from _shard(file)
            if is_held_out(file.name):
                yield "  held out, as its name says"
        return
    dataset = open_dataset(path)
    yield f"{path}: a complete dataset"
    for title in ("source", "settings", "counts"):
        values = getattr(manifest, title)
        yield f"  {title}: {', '.join(f'{key} {value}' for key, value in values.items())}"
    for left_out in manifest.left_out:
        yield f"  left out: {left_out}"
    for split in ("train", "val"):
        shards = [shard for shard in manifest.shards if shard.split == split]
        documents = sum(shard.documents for shard in shards)
        tokens = sum(shard.tokens for shard in shards)
        yield f"  {split}: {tokens:,} tokens, {documents:,} documents, {len(shards)} shards"
    yield f"  fingerprint: {dataset.fingerprint}"
    if verify:
        for name in ShardVerification(dataset, threads=os.cpu_count() or 1):
            yield f"  {name}: SHA-256 matches"
    else:
        yield "  headers and sizes match; --verify compares every SHA-256"


def _checkpoint(path: Path, verify: bool) -> Iterator[str]:
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors()
    parameters = sum(tensor.numel() for tensor in tensors["model"].values())
    yield f"{path}: a checkpoint after {checkpoint.step:,} steps"
    yield f"  model: {parameters:,} parameters in {len(tensors['model'])} tensors"
    yield f"  optimizer: {len(tensors['optimizer'])} tensors"
    if checkpoint.state.origin:
        yield f"  the run began as a branch of {checkpoint.state.origin}"
    if checkpoint.state.initial_weights:
        yield f"  the run began with the weights of {checkpoint.state.initial_weights}"
    if checkpoint.state.val_loss is not None:
        tokens = checkpoint.state.val_tokens
        on = f" on {tokens:,} tokens" if tokens else ""
        yield f"  held-out loss: {checkpoint.state.val_loss:.4f} nats per token{on}"
    state = checkpoint.state.to_json()
    if source := state["source"]:
        yield f"  code: {describe_source(source)}, SHA-256 {source.get('sha256')}"
    for name in ("windows_consumed", "micro_batch_size", "model", "identity", "versions"):
        yield f"  {name}: {state[name]}"
    if verify:
        checkpoint.verify()
        yield "  every SHA-256 matches"
        for file, values in tensors.items():
            for name, tensor in values.items():
                if not bool(tensor.isfinite().all()):
                    raise UserError(
                        f"{path}: {name} of the {file} has values that are NaN or infinite",
                        "continue from an earlier checkpoint",
                    )
        yield "  every value is finite"


def _run(path: Path, verify: bool) -> Iterator[str]:
    metrics = path / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    yield f"{path}: a run with {len(records):,} steps in metrics.jsonl"
    if records:
        last = records[-1]
        yield f"  step {last.step}: train_loss {last.train_loss:.4f}"
        measured = [record for record in records if record.val_loss is not None]
        if measured:
            yield f"  step {measured[-1].step}: val_loss {measured[-1].val_loss:.4f}"
    steps = checkpoint_steps(path / "checkpoints")
    yield f"  checkpoints: {', '.join(map(str, steps)) or 'none'}"
    if patches := read_patches(path):
        yield f"  code changes: {', '.join(map(patch_name, patches))}"
    if steps:
        yield from _checkpoint(checkpoint_folder(path / "checkpoints", steps[-1]), verify)
