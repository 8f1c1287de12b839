"""Describing and verifying what prepare and train have made."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from app.data.dataset import ShardVerification, open_dataset
from app.data.manifest import MANIFEST, Manifest
from app.data.shards import Tokens, open_shard
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.runs.checkpoint import checkpoint_folder, checkpoint_steps, open_checkpoint
from app.runs.checkpoint_state import STATE_FILE
from app.runs.metrics import read_metrics
from app.settings.settings import Settings


def inspect(settings: Settings, *, path: str, verify: bool) -> None:
    """Print the description of what is at a path, or at the same path below DATA_DIR.

    Raises:
        UserError: there is nothing; or see `describe`.
    """
    data_dir = settings.general.data_dir
    for place in (Path(path), data_dir / path):
        if place.exists():
            for line in describe(place, verify=verify):
                print(line, flush=True)
            return
    raise UserError(
        f"there is no {path}, neither here nor in {data_dir}",
        "name a .bin file, or a folder that prepare or train has written",
    )


def describe(path: Path, *, verify: bool) -> Iterator[str]:
    """Describe a shard, a dataset folder, a checkpoint or a run, a line at a time.

    Args:
        path: of any of them.
        verify: compare every hash and look at every value as well.

    Raises:
        UserError: it is none of them, or damaged: it names the file and the fault.
    """
    if path.is_file():
        return _shard(path)
    if (path / STATE_FILE).exists():
        return _checkpoint(path, verify)
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").exists():
        return _run(path, verify)
    if (path / MANIFEST).exists() or any(path.glob("*.bin")):
        return _dataset(path, verify)
    raise UserError(
        f"{path} is no shard, dataset folder, checkpoint or run",
        "name a .bin file, or a folder that prepare or train has written",
    )


def _shard(path: Path) -> Iterator[str]:
    tokens = open_shard(path)
    yield f"{path}: a shard of {tokens.size:,} GPT-2 tokens, {path.stat().st_size:,} bytes"
    largest, documents = _look_at(path, tokens)
    yield f"  {documents:,} documents begin in it; the largest token is {largest}"


def _look_at(path: Path, tokens: Tokens) -> tuple[int, int]:
    largest = documents = 0
    for start in range(0, tokens.size, 1 << 24):
        part = tokens[start : start + (1 << 24)]
        largest = max(largest, int(part.max()))
        documents += int(np.count_nonzero(part == END_OF_TEXT))
    if largest > END_OF_TEXT:
        raise UserError(
            f"{path} holds token {largest}, GPT-2's vocabulary ends at {END_OF_TEXT}",
            "prepare the dataset again",
        )
    return largest, documents


def _dataset(path: Path, verify: bool) -> Iterator[str]:
    manifest = Manifest.load(path)
    if manifest is None:
        yield f"{path}: shards without a {MANIFEST}, as llm.c writes them"
        for file in sorted(path.glob("*.bin")):
            yield from _shard(file)
        return
    dataset = open_dataset(path)
    yield f"{path}: a complete dataset"
    told = {"source": manifest.source, "settings": manifest.settings, "counts": manifest.counts}
    for title, facts in told.items():
        yield f"  {title}: {', '.join(f'{name} {value}' for name, value in facts.items())}"
    for split in ("train", "val"):
        shards = [shard for shard in manifest.shards if shard.split == split]
        documents = sum(shard.documents for shard in shards)
        tokens = sum(shard.tokens for shard in shards)
        yield f"  {split}: {tokens:,} tokens, {documents:,} documents, {len(shards)} shards"
    yield f"  fingerprint: {dataset.fingerprint}"
    if verify:
        for name in ShardVerification(dataset, os.cpu_count() or 1):
            yield f"  {name}: SHA-256 is right"
    else:
        yield "  headers and sizes are right; --verify compares every SHA-256"


def _checkpoint(path: Path, verify: bool) -> Iterator[str]:
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors()
    parameters = sum(tensor.numel() for tensor in tensors["model"].values())
    yield f"{path}: a checkpoint after {checkpoint.step:,} steps"
    yield f"  model: {parameters:,} parameters in {len(tensors['model'])} tensors"
    yield f"  optimizer: {len(tensors['optimizer'])} tensors"
    state = checkpoint.state.to_json()
    for name in ("windows_consumed", "micro_batch_size", "model", "identity", "versions"):
        yield f"  {name}: {state[name]}"
    if verify:
        checkpoint.verify()
        yield "  every SHA-256 is right"
        for file, values in tensors.items():
            for name, tensor in values.items():
                if not bool(tensor.isfinite().all()):
                    raise UserError(
                        f"{path}: {name} of the {file} has values that are not finite",
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
    if steps:
        yield from _checkpoint(checkpoint_folder(path / "checkpoints", steps[-1]), verify)
