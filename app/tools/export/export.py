"""A checkpoint as a Hugging Face GPT-2 folder: weights, configuration, tokenizer, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.data.dataset import open_dataset
from app.data.manifest import Manifest
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.files import atomic_folder
from app.runs.checkpoint import Checkpoint, latest_checkpoint, save_tensors
from app.settings.settings import Settings
from app.tools.export.model_card import model_card
from app.tools.export.tokenizer_files import TOKENIZER_FILES, tokenizer_files

if TYPE_CHECKING:
    from app.model.gpt import GPT

WEIGHTS = "model.safetensors"
# Names the checkpoint of an export; a folder without it is not ours.
ORIGIN = "export.json"
FILES = (
    *(WEIGHTS, "config.json", "generation_config.json", "README.md", ORIGIN),
    *TOKENIZER_FILES,
)


def export(settings: Settings) -> None:
    """Write the folder: all of it, or nothing under its name. An earlier export is replaced.

    Raises:
        UserError: there is no such checkpoint, or the folder holds something else.
    """
    folder = settings.export_dir
    if folder.is_symlink():
        folder = folder.resolve()
    _refuse_what_is_not_ours(folder)
    checkpoint = latest_checkpoint(settings.run_dir, settings.export.step)

    # Torch takes seconds to import: what can be wrong without it has been told by now.
    import torch

    from app.hardware.device import select_device
    from app.model.huggingface import gpt2_config, gpt2_weights
    from app.runs.load import load_gpt

    dtype = getattr(torch, settings.export.dtype)
    model = load_gpt(checkpoint, select_device("cpu", "float32", "auto"))
    origin = _origin(settings, model, checkpoint)
    texts = {
        "config.json": _json(gpt2_config(model, dtype, END_OF_TEXT)),
        "generation_config.json": _json(
            {f"{name}_token_id": END_OF_TEXT for name in ("bos", "eos", "pad")}
        ),
        "README.md": model_card(origin).encode(),
        ORIGIN: _json(origin),
        **tokenizer_files(model.config.context_length),
    }
    with atomic_folder(folder) as partial:
        save_tensors(gpt2_weights(model, dtype), partial / WEIGHTS, {"format": "pt"})
        for name, content in texts.items():
            (partial / name).write_bytes(content)
        # safetensors keeps its file from other users.
        (partial / WEIGHTS).chmod((partial / ORIGIN).stat().st_mode)
    print(f"{folder}: {checkpoint.folder} as a GPT2LMHeadModel in {settings.export.dtype}")


def _refuse_what_is_not_ours(folder: Path) -> None:
    fix = "set EXPORT_OUT_DIR to another folder, or move that away"
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is a file", fix)
        return
    if folder.is_mount():
        raise UserError(
            f"{folder} is a mount point, and a complete folder cannot take its place",
            f"set EXPORT_OUT_DIR to a folder in it, such as {folder / 'export'}",
        )
    found = {path.name for path in folder.iterdir()}
    if found and ORIGIN not in found:
        raise UserError(f"{folder} exists, and is not an export", fix)
    if others := sorted(found.difference(FILES)):
        raise UserError(f"{folder} holds what export has not written: {', '.join(others)}", fix)


def _origin(settings: Settings, model: GPT, checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the weights come from: the content of export.json, and the facts of the model card."""
    state, config = checkpoint.state, model.config
    fingerprint = state.identity["dataset_fingerprint"]
    return {
        "run": settings.run_dir.name,
        "step": checkpoint.step,
        "dtype": settings.export.dtype,
        "parameters": model.num_parameters(),
        "model": state.model,
        "dataset": {
            "fingerprint": fingerprint,
            **_described(settings.train_dataset_dir, fingerprint),
        },
        "tokens_seen": state.sequences_consumed * config.context_length,
        "val_loss": state.val_loss,
        "versions": state.versions,
    }


def _described(dataset_dir: Path, fingerprint: str) -> dict[str, Any]:
    """Return the dataset's source and size by its manifest, if it is still there."""
    try:
        dataset, manifest = open_dataset(dataset_dir), Manifest.load(dataset_dir)
    except UserError:
        return {}
    if manifest is None or dataset.fingerprint != fingerprint:
        return {}
    return {"source": manifest.source, "train_tokens": manifest.tokens("train")}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
