"""Export of a checkpoint as a folder for transformers: weights, tokenizer, model card."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.data.dataset import open_dataset
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.files import atomic_folder, json_bytes
from app.locks import locked
from app.runs.checkpoint import Checkpoint, save_tensors
from app.runs.checkpoints import latest_checkpoint
from app.settings.settings import Settings
from app.tools.dataset import dataset_of
from app.tools.export.model_card import model_card
from app.tools.export.tokenizer_files import TOKENIZER_FILES, tokenizer_files
from app.tools.latest_run import with_latest_run

if TYPE_CHECKING:
    from app.model.language_model import LanguageModel

WEIGHTS = "model.safetensors"
# Records the origin of an export; a folder without it is not one.
ORIGIN = "export.json"
FILES = (
    *(WEIGHTS, "config.json", "generation_config.json", "README.md", ORIGIN),
    *TOKENIZER_FILES,
)


def export(settings: Settings) -> None:
    """Write the checkpoint to the export folder, atomically. An earlier export is replaced.

    Raises:
        UserError: there is no such checkpoint, or the folder holds something else.
    """
    settings = with_latest_run(settings)
    folder = settings.export_dir
    if folder.is_symlink():
        folder = folder.resolve()
    checkpoint = latest_checkpoint(
        settings.run_dir, settings.export.step, use_best=settings.train.use_best
    )
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(folder, "export", file=lock):
        name = _write(settings, checkpoint, folder)
    print(f"{folder}: {checkpoint.folder} as a {name} in {settings.export.dtype}")


def _write(settings: Settings, checkpoint: Checkpoint, folder: Path) -> str:
    """Write the folder, and return the name of transformers' class."""
    # Imported after all checks, because torch takes seconds.
    import torch

    from app.model.architectures import to_huggingface
    from app.runs.load import load_weights, new_model
    from app.tools.export.reference import check_matches_transformers

    dtype = getattr(torch, settings.export.dtype)
    model = new_model(checkpoint)
    check_matches_transformers(model, lambda: load_weights(checkpoint, model))
    config, weights = to_huggingface(model, dtype, END_OF_TEXT)
    origin = _origin(settings, model, checkpoint)
    # Without max_length, transformers' pipeline writes 256 tokens, whatever the model can take.
    generation = {
        "max_length": model.config.context_length,
        **{f"{name}_token_id": END_OF_TEXT for name in ("bos", "eos", "pad")},
    }
    contents = {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation),
        "README.md": model_card(origin).encode(errors="replace"),
        ORIGIN: json_bytes(origin),
        **tokenizer_files(model.config.context_length),
    }
    with atomic_folder(folder) as partial:
        save_tensors(weights, partial / WEIGHTS, {"format": "pt"})
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        # safetensors makes its file unreadable for other users.
        # A file system that refuses this decides itself who may read its files.
        with suppress(OSError):
            (partial / WEIGHTS).chmod((partial / ORIGIN).stat().st_mode)
    return str(config["architectures"][0])


def _check_replaceable(folder: Path) -> None:
    """Raise UserError unless the folder is new, empty or an export."""
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
    names = {path.name for path in folder.iterdir()}
    if names and ORIGIN not in names:
        raise UserError(f"{folder} exists and is not an export", fix)
    if others := sorted(names.difference(FILES)):
        raise UserError(f"{folder} has files that export did not write: {', '.join(others)}", fix)


def _origin(settings: Settings, model: LanguageModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of export.json, from which the model card is made."""
    state, config = checkpoint.state, model.config
    fingerprint = state.identity["dataset_fingerprint"]
    return {
        "run": settings.run_dir.name,
        "step": checkpoint.step,
        **({"began_as": state.origin} if state.origin else {}),
        **({"initial_weights": state.initial_weights} if state.initial_weights else {}),
        "dtype": settings.export.dtype,
        "parameters": model.num_parameters(),
        "multiplied": model.num_multiplied(),
        "model": state.model,
        "dataset": {
            "fingerprint": fingerprint,
            **_describe_dataset(dataset_of(settings), fingerprint),
        },
        "tokens_seen": state.sequences_consumed * config.context_length,
        "val_loss": state.val_loss,
        "val_tokens": state.val_tokens,
        "versions": state.versions,
    }


def _describe_dataset(folder: Path, fingerprint: str) -> dict[str, Any]:
    """Return the dataset's source and size, if it is still there and has a manifest."""
    try:
        dataset = open_dataset(folder)
    except UserError:
        return {}
    manifest = dataset.manifest
    if manifest is None or dataset.fingerprint != fingerprint:
        return {}
    return {"source": manifest.source, "train_tokens": manifest.tokens("train")}
