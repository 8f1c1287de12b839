"""A model of transformers to begin with: where it is, its shape and its files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.dataset_names import HUB_ID
from app.errors import UserError
from app.files import read_json, sha256_of
from app.model.config_json import model_shape

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZERS = ("vocab.json", "tokenizer.json")
SMALL_FILES = (CONFIG, INDEX, *TOKENIZERS)
_HUB_MODEL = re.compile(rf"({HUB_ID})(?:@([\w./-]+))?", re.ASCII)
_FIX = (
    "set TRAIN_INIT_FROM to a GPT-2 (openai-community/gpt2, -medium, -large, -xl, or one trained "
    "from these with their vocabulary), or to what export has written"
)


def hub_model(init_from: str, run_dir: Path) -> tuple[str, str] | None:
    """Return the hub id and the revision that TRAIN_INIT_FROM names; None for a run or a folder.

    Args:
        run_dir: folder of the new run.
    """
    match = _HUB_MODEL.fullmatch(init_from)
    if match is None or local_model(init_from, run_dir):
        return None
    name, revision = match.groups(default="main")
    # The step of a run that is missing.
    return None if "/" not in name and revision.isdecimal() else (name, revision)


def local_model(init_from: str, run_dir: Path) -> Path | None:
    """Return the folder of the run or of the model that TRAIN_INIT_FROM names; None without it.

    The new run itself, which may have the name of its model, is none.
    """
    if run := local_run(init_from, run_dir):
        return run
    folders = (Path(init_from), run_dir.parents[1] / init_from)
    return next((it for it in folders if it.exists()), None)


def local_run(init_from: str, run_dir: Path) -> Path | None:
    """Return the folder of the other run that TRAIN_INIT_FROM names; None without it."""
    name = init_from.partition("@")[0]
    folder = run_dir.parent / name
    return folder if "/" not in name and folder != run_dir and folder.exists() else None


def read_model_folder(folder: Path, name: str) -> dict[str, Any]:
    """Return the shape of the model in a folder, as build_config takes it.

    Args:
        name: the model's name in messages.

    Raises:
        UserError: there is no such model, it has another vocabulary, or is computed otherwise.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} has no {CONFIG}: it is not a model of transformers", _FIX)
    try:
        shape = model_shape(read_json(folder / CONFIG, _FIX))
        _check_vocabulary(folder)
    except ValueError as error:
        raise UserError(f"{name} cannot be trained further here: {error}", _FIX) from None
    return shape


def weight_files(folder: Path, name: str, exists: Callable[[str], bool]) -> list[str]:
    """Return the names of the files with the weights.

    Args:
        exists: tells whether the model has a file of this name.

    Raises:
        UserError: it has none, or they are pickles.
    """
    if exists(WEIGHTS):
        return [WEIGHTS]
    if exists(INDEX):
        index = read_json(folder / INDEX, _FIX).get("weight_map")
        names = sorted({*index.values()}) if isinstance(index, dict) else []
        if names and all(isinstance(it, str) and Path(it).name == it for it in names):
            if absent := [it for it in names if not exists(it)]:
                raise UserError(f"{name} lacks {', '.join(absent)}", "add what is missing")
            return names
        raise UserError(f"{name} has a wrong {INDEX}", _FIX)
    if any(map(exists, ("pytorch_model.bin", "pytorch_model.bin.index.json"))):
        raise UserError(
            f"{name} has its weights as a pickle only, which can run any code when it is read",
            "where you trust it, transformers' from_pretrained(NAME).save_pretrained(FOLDER) "
            f"writes {WEIGHTS} from it; then set TRAIN_INIT_FROM to that folder",
        )
    raise UserError(f"{name} has no {WEIGHTS}", _FIX)


def _check_vocabulary(folder: Path) -> None:
    """Raise ValueError if a tokenizer in the folder is not GPT-2's."""
    from app.data.tokenizer import VOCABULARY, vocabulary_files

    file = next((folder / it for it in TOKENIZERS if (folder / it).is_file()), None)
    published = vocabulary_files()
    if file is None or published is None or sha256_of(file) == VOCABULARY["encoder.json"]:
        return
    content, own = read_json(file, _FIX), json.loads(published[1].read_bytes())
    try:
        tokens = content if file.name == TOKENIZERS[0] else content["model"]["vocab"]
        same = {**own, **tokens} == own and len(tokens) >= len(own) - 1
    except (KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(f"its vocabulary is not GPT-2's ({file.name})")
