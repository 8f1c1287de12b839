"""The weights with which a new run begins, in place of random ones: TRAIN_INIT_FROM.

Works without torch until the weights are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import AppError, UserError
from app.prepare.model_folder import (
    hub_model,
    local_model,
    local_run,
    read_model_folder,
    weight_files,
)
from app.runs.branch import find_checkpoint, origin_of
from app.runs.checkpoint import MODEL_FILE, Checkpoint, checkpoint_folder, open_checkpoint
from app.runs.checkpoint_state import STATE_FILE, CorruptCheckpoint
from app.runs.checkpoints import checkpoint_steps, latest_runs, missing_run_error
from app.runs.code import warn_of_other_model
from app.runs.folder import RunFolder
from app.settings.settings import Settings
from app.settings.train import ModelSettings

if TYPE_CHECKING:
    from app.model.language_model import LanguageModel

_VARIABLE = "TRAIN_INIT_FROM"


@dataclass(frozen=True)
class InitialWeights:
    """Weights of another model.

    Attributes:
        name: what is recorded: a hub id with its commit, a folder, or RUN@STEP
        shape: the shape of that model
        files: transformers' files with the weights; none if they are those of `checkpoint`
    """

    name: str
    shape: dict[str, Any]
    files: tuple[Path, ...] = ()
    checkpoint: Checkpoint | None = None

    def load(self, model: LanguageModel) -> None:
        """Copy the weights into a model of this shape, whose context may be shorter.

        Raises:
            UserError: the files hold other weights.
        """
        from app.model.pretrained import load_pretrained

        if self.checkpoint:
            warn_of_other_model(self.checkpoint)
            self.checkpoint.load_model(model, positions=model.config.context_length)
            return
        try:
            load_pretrained(model, self.files)
        except ValueError as error:
            raise UserError(
                f"the weights of {self.name} are not those that its config.json describes: {error}",
                f"restore its files, or set {_VARIABLE} to another model",
            ) from None


def with_initial_weights(settings: Settings) -> tuple[Settings, InitialWeights | None]:
    """Return the settings with the shape of the model that the run begins with, and its weights.

    A run that has a checkpoint, or branches from one, has its shape from there, and needs no
    weights. Without TRAIN_INIT_FROM nothing changes.

    Raises:
        UserError: there is no such model, it cannot be trained here, or MODEL_* settings differ.
        NetworkError: the hub does not answer.
    """
    init_from, run = settings.train.init_from, RunFolder(settings.run_dir)
    if init_from is None:
        return settings, None
    if shape := _shape_of(run):
        return with_shape(settings, shape, str(run.path)), None
    if settings.train.branch_from:
        source = RunFolder(run.path.with_name(settings.train.branch_from.partition("@")[0]))
        shape = _shape_of(source)
        # Without one, the error is that of the branch.
        return (with_shape(settings, shape, source.path.name) if shape else settings), None
    weights = _find_weights(settings, init_from)
    return with_shape(settings, weights.shape, weights.name), weights


def are_published(settings: Settings) -> bool:
    """Return True if a run begins with weights that no run here has trained."""
    init_from = settings.train.init_from
    return init_from is not None and local_run(init_from, settings.run_dir) is None


def _shape_of(run: RunFolder) -> dict[str, Any] | None:
    """Return the shape of a run's last checkpoint whose state can be read; None without one."""
    for step in reversed(checkpoint_steps(run.checkpoints)):
        try:
            return open_checkpoint(checkpoint_folder(run.checkpoints, step)).state.model
        except CorruptCheckpoint:
            continue
    return None


def _find_weights(settings: Settings, init_from: str) -> InitialWeights:
    data_dir, token = settings.general.data_dir, settings.general.hf_token
    name, _, step = init_from.partition("@")
    if step.isdecimal() and name == settings.run_dir.name:
        raise UserError(
            f"{_VARIABLE}={init_from}: a run cannot begin with its own weights",
            "set TRAIN_RUN_NAME to the name of the new run",
        )
    if hub_id := hub_model(init_from, settings.run_dir):
        # The hub's libraries take a while to import.
        from app.prepare.hub_client import Repository
        from app.prepare.hub_model import download_model

        repository = Repository(*hub_id, "model")
        secret = token.get_secret_value() if token else None
        cache_dir, waits = data_dir / "cache", settings.prepare.retry_seconds
        try:
            folder, commit = download_model(repository, cache_dir, secret, waits)
        except AppError as error:
            runs = ", ".join(sorted(run.name for run, _ in latest_runs(data_dir / "runs")))
            if not runs or "/" in name:
                raise
            raise type(error)(error.problem, f"{error.fix}; runs here: {runs}") from None
        return _in_folder(folder, f"{repository.name}@{commit}")
    place = local_model(init_from, settings.run_dir)
    if place is None and "/" not in name and step.isdecimal():
        raise missing_run_error(data_dir / "runs" / name, _VARIABLE)
    if place is None:
        fix = f"correct {_VARIABLE}: a model of the hub, a folder, or RUN or RUN@STEP"
        raise UserError(f"there is no folder {init_from}", fix)
    if local_run(init_from, settings.run_dir) is None:
        return _in_folder(place, init_from)
    if step and not step.isdecimal():
        fix = f"set {_VARIABLE} to {name}, or to {name}@STEP with the step of a checkpoint"
        raise UserError(f"{init_from} is not a checkpoint of a run", fix)
    number = int(step) if step else None
    checkpoint = find_checkpoint(RunFolder(place), number, _VARIABLE, (MODEL_FILE,))
    shape = checkpoint.state.model
    return InitialWeights(origin_of(checkpoint), shape, checkpoint=checkpoint)


def _in_folder(folder: Path, name: str) -> InitialWeights:
    if folder.is_file():
        fix = f"set {_VARIABLE} to its folder, {folder.parent}"
        raise UserError(f"{folder} is a file, not a folder", fix)
    if (folder / STATE_FILE).exists() or (folder / "checkpoints").is_dir():
        fix = f"set {_VARIABLE} to the run's name, or RUN@STEP"
        raise UserError(f"{folder} is a folder of a run", fix)
    shape = read_model_folder(folder, name)
    files = weight_files(folder, name, lambda file: (folder / file).is_file())
    return InitialWeights(name, shape, tuple(folder / file for file in files))


def with_shape(settings: Settings, shape: dict[str, Any], name: str) -> Settings:
    """Return the settings with a model's shape; UserError names those that were set otherwise.

    A context shorter than the model's may be set, and any with rotary positions.
    """
    own, fields = settings.model, dict(shape)
    if "tie_embeddings" in fields:
        fields["tie_embeddings"] = str(fields["tie_embeddings"]).lower()
    try:
        model = ModelSettings(**fields)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} has a shape that is not supported: {reason}",
            f"set {_VARIABLE} to another model",
        ) from None
    has = model.model_dump()
    if model.architecture == "gpt2":
        has |= {"head_dim": model.embd_size // model.num_heads, "tie_embeddings": "true"}
    faults = []
    for field in sorted(own.model_fields_set):
        wanted, is_context = getattr(own, field), field == "context_length"
        if wanted in (has[field], "auto"):
            continue
        if is_context and (wanted < has[field] or model.architecture == "qwen3"):
            model = model.model_copy(update={field: wanted})
            continue
        limit = ", and can only be cut" if is_context else ""
        faults.append(f"MODEL_{field.upper()}={wanted}, but {name} has {has[field]}{limit}")
    resolved = settings.model_copy(update={"model": model})
    if faults:
        raise UserError("; ".join(faults), f"leave these out: {_VARIABLE} sets the model")
    for (first, other), reason in resolved.conflicts().items():
        problem = f"with the model of {name}, {first} and {other} conflict: {reason}"
        raise UserError(problem, "correct them")
    return resolved
