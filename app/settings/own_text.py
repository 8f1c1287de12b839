"""Own text: which recipe and dataset it means, and the sizes that fit the length of the text."""

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from app.dataset_names import is_own_text
from app.files import json_value
from app.formats import plural
from app.settings.settings import Settings

RECIPE = "own-text"
# These may be `auto`, whose value depends on the dataset.
FITTED = frozenset(
    {
        *("MODEL_NUM_LAYERS", "MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"),
        *("TRAIN_TOKENS_PER_STEP", "TRAIN_MAX_STEPS"),
        *("TRAIN_VAL_EVERY", "TRAIN_SAMPLE_EVERY", "TRAIN_CHECKPOINT_EVERY"),
    }
)
# A branch takes these from the run that it begins with.
_FIXED = ("MODEL_", "TRAIN_TOKENS_PER_STEP")
_SAVED = "checkpoints/step-*"
_HEAD_DIM = 64
_MEASUREMENTS = 10


class _Size(NamedTuple):
    """The sizes for texts of fewer than `below` tokens."""

    below: float
    layers: int
    width: int
    tokens_per_step: int
    epochs: float


_ON_CPU = (
    _Size(1e6, 4, 128, 1024, 3),
    _Size(5e6, 4, 192, 2048, 2),
    _Size(math.inf, 6, 256, 4096, 1),
)
_ON_GPU = (
    _Size(1e6, 4, 256, 4096, 4),
    _Size(5e6, 6, 384, 8192, 3),
    _Size(math.inf, 8, 512, 16384, 2),
)


def own_text_settings(values: Mapping[str, str], command: str, usual_dir: Path) -> dict[str, str]:
    """Return the recipe of own text, and its dataset, if that is what the command is about.

    It is if PREPARE_DATASET names local text; or if no other dataset is named, the usual one is not
    there, and one of own text is.

    Args:
        values: texts of the settings that are set, by variable.
        usual_dir: where prepare writes with these settings.
    """
    recipe, dataset = values.get("RECIPE"), values.get("PREPARE_DATASET")
    chosen = {"RECIPE": RECIPE}
    # Weights that are trained further need other rates: that recipe is named.
    if recipe not in (None, RECIPE) or command == "inspect" or "TRAIN_INIT_FROM" in values:
        return {}
    if dataset is not None:
        return chosen if recipe or is_own_text(dataset) else {}
    is_named = values.keys() & {"TRAIN_DATASET_DIR", "PREPARE_OUT_DIR"}
    is_searched = command != "prepare" and (recipe or not usual_dir.exists())
    latest = "" if is_named or not is_searched else _latest_own_text(usual_dir.parent)
    if latest and command not in ("train", "sweep", "doctor"):
        # Another run, the named one or the latest, knows its own text.
        runs, run = usual_dir.parent / "runs", usual_dir.parent / "runs" / latest
        has_begun = (run / "metrics.jsonl").exists() or any(run.glob(_SAVED))
        is_untrained = not has_begun and any(runs.glob(f"*/{_SAVED}"))
        latest = "" if is_untrained or "TRAIN_RUN_NAME" in values else latest
    return {**chosen, "TRAIN_DATASET_DIR": latest} if latest else chosen if recipe else {}


def fitted(settings: Settings, given: Collection[str]) -> dict[str, int]:
    """Return a value for each variable of FITTED; a run that has begun keeps its values.

    Args:
        settings: all settings, with anything for variables of FITTED that are not given.
        given: the variables of FITTED that are set.
    """
    run = _values_of(json_value(settings.run_dir / "settings.json", "settings"))
    if run.keys() == FITTED and any(settings.run_dir.glob(_SAVED)):
        return run
    tokens = json_value(settings.train_dataset_dir / "manifest.json", "totals", "train_tokens")
    values = {name: it for name, it in _values_of(settings.public()).items() if name in given}
    # A branch has the model and the batches of the run that it begins with.
    origin = (settings.train.branch_from or "").partition("@")[0]
    source = settings.run_dir.parent / origin / "settings.json"
    if origin and (run := json_value(source, "settings")):
        values = {k: v for k, v in _values_of(run).items() if k.startswith(_FIXED)} | values
    return sizes(
        # Before there is a dataset, doctor estimates with as much as a few megabytes have.
        tokens if isinstance(tokens, int) else 1_000_000,
        settings.model.context_length,
        values,
        on_gpu=_has_gpu(settings.train.device),
    )


def note(settings: Settings) -> str:
    """Return a line on the recipe of own text; empty with another recipe."""
    model, train = settings.model, settings.train
    return (settings.general.recipe == RECIPE) * (
        f"RECIPE={RECIPE}, by the size of this text: {plural(model.num_layers, 'layer')} of width "
        f"{model.embd_size}, {plural(train.max_steps, 'step')} of {train.tokens_per_step:,} tokens"
    )


def sizes(
    tokens: int, context_length: int, given: Mapping[str, int], *, on_gpu: bool
) -> dict[str, int]:
    """Return the sizes for a text of `tokens` training tokens, with those that are given."""
    size = next(size for size in (_ON_GPU if on_gpu else _ON_CPU) if tokens < size.below)
    values = {
        "MODEL_NUM_LAYERS": size.layers,
        "MODEL_EMBD_SIZE": size.width,
        "TRAIN_TOKENS_PER_STEP": max(1, size.tokens_per_step // context_length) * context_length,
        **given,
    }
    width = values["MODEL_EMBD_SIZE"]
    heads = (count for count in range(max(1, width // _HEAD_DIM), 0, -1) if width % count == 0)
    steps = math.ceil(size.epochs * tokens / values["TRAIN_TOKENS_PER_STEP"])
    values = {"MODEL_NUM_HEADS": next(heads), "TRAIN_MAX_STEPS": max(1, steps), **values}
    every = math.ceil(values["TRAIN_MAX_STEPS"] / _MEASUREMENTS)
    return {name: every for name in FITTED if name.endswith("_EVERY")} | values


def _latest_own_text(data_dir: Path) -> str:
    """Return the folder's name of the dataset that was prepared last from local text, if any."""
    manifests = sorted(data_dir.glob("*/manifest.json"), key=lambda path: -path.stat().st_mtime)
    own = (path for path in manifests if json_value(path, "source", "dataset") == "files")
    return next((path.parent.name for path in own), "")


def _values_of(settings: Any) -> dict[str, int]:
    """Return the variables of FITTED with their recorded values; not what is missing or damaged."""
    values = {}
    for name in FITTED:
        group, field = name.lower().split("_", 1)
        with suppress(KeyError, TypeError):
            values[name] = settings[group][field]
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _has_gpu(device: str) -> bool:
    """Return True if this machine seems to train on a GPU, without importing torch.

    A Mac's counts as none: the sizes for a CPU keep it busy, with hours less to wait.
    """
    if device != "auto":
        return device == "cuda"
    try:
        is_cpu_build = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        is_cpu_build = False
    # Every WSL 2 has the device dxg; the library comes with NVIDIA's driver for Windows.
    return not is_cpu_build and (
        any(next(Path("/dev").glob(name), None) for name in ("nvidia[0-9]*", "kfd"))
        or (Path("/dev/dxg").exists() and find_library("cuda") is not None)
    )
