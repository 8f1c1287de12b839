"""`prepare`: the pipeline's arguments from the settings."""

import gc
import os
import sys
from pathlib import Path

from app.data.hellaswag import provide_questions
from app.dataset_names import is_own_text
from app.errors import UserError
from app.prepare.model_folder import hub_model
from app.prepare.spec import DatasetSpec, TextSource
from app.settings.next_command import command_with_settings
from app.settings.own_text import FITTED, RECIPE
from app.settings.settings import Settings

# Folders of DATA_DIR that have other things than datasets.
_NO_DATASETS = ("runs", "cache", "reports", "sweeps", "trackio")


def prepare(settings: Settings) -> None:
    """Turn text into token shards; see app.prepare.pipeline.prepare."""
    # Imported modules are never garbage; looking for some among them takes 30 ms of a start.
    gc.set_threshold(100_000)
    from app.prepare.pipeline import prepare as run_pipeline

    cfg, token = settings.prepare, settings.general.hf_token
    secret = token.get_secret_value() if token else None
    spec = dataset_spec(settings)
    check_out_dir(settings.prepare_dir, settings.general.data_dir)
    context_length = settings.model.context_length
    if cfg.sets_val_tokens and 0 < cfg.val_tokens < context_length:
        print(
            f"warning: {cfg.val_tokens:,} held-out tokens are less than a sequence of "
            f"{context_length:,} (MODEL_CONTEXT_LENGTH): train cannot measure a held-out loss on "
            f"them; set PREPARE_VAL_TOKENS to {context_length:,} or more",
            flush=True,
        )
    if settings.train.hellaswag_every and settings.train.hellaswag_file is None:
        # The container of train has no network.
        provide_questions(settings.hellaswag_file)
    run_pipeline(
        spec,
        settings.prepare_dir,
        workers=(os.cpu_count() or 1) if cfg.workers == "auto" else cfg.workers,
        hf_token=secret,
    )
    if hub_id := hub_model(settings.train.init_from or "", settings.run_dir):
        from app.prepare.hub_client import Repository, UnknownRepositoryError
        from app.prepare.hub_model import download_model

        # As for the questions; the text is prepared even if the hub does not answer.
        repository, cache_dir = Repository(*hub_id, "model"), settings.general.data_dir / "cache"
        try:
            download_model(repository, cache_dir, secret, cfg.retry_seconds)
        except UnknownRepositoryError as error:
            # Without an owner, it may be a run that is trained later.
            if "/" in repository.name:
                raise
            fix = f"{error.fix}; or train the run {repository.name} first"
            print(f"warning: {error.problem}; {fix}", file=sys.stderr, flush=True)
    print_next(settings)


def print_next(settings: Settings) -> None:
    """Print the command that trains on the dataset."""
    if settings.general.recipe == RECIPE:
        print(f"local text uses RECIPE={RECIPE}; RECIPE=NAME chooses another")
    train = settings.train.model_copy(update={"dataset_dir": settings.prepare.dataset_dir})
    # The sizes that fit the text are chosen anew, now that its length is known.
    but = FITTED if settings.general.recipe == RECIPE else ()
    command = command_with_settings(settings.model_copy(update={"train": train}), "train", but)
    print(f"next: {command}", flush=True)


def check_out_dir(folder: Path, data_dir: Path) -> None:
    """Raise UserError for a folder that holds something else: DATA_DIR, or one of _NO_DATASETS."""
    folder, data_dir = folder.resolve(), data_dir.resolve()
    taken = any(folder.is_relative_to(data_dir / name) for name in _NO_DATASETS)
    if folder == data_dir or taken:
        names = ", ".join(_NO_DATASETS)
        raise UserError(
            f"the dataset's folder {folder} is {data_dir}, or in one of its folders {names}",
            "set PREPARE_OUT_DIR to another name",
        )


def dataset_spec(settings: Settings) -> DatasetSpec:
    """Return the dataset that the settings describe.

    Raises:
        UserError: a recipe takes all of a text, and nobody has named one.
    """
    cfg, data_dir, recipe = settings.prepare, settings.general.data_dir, settings.general.recipe
    if recipe and cfg.total_tokens == "all" and "dataset" not in cfg.model_fields_set:
        raise UserError(
            f"RECIPE={recipe} takes all of a text, and PREPARE_DATASET does not name one",
            "set PREPARE_DATASET to a file, a folder, or a dataset of the Hub",
        )
    source = TextSource(
        cfg.dataset,
        cfg.config,
        cfg.dataset_revision,
        cfg.split,
        cfg.text_column,
        cfg.shuffle_files,
        cfg.encoding,
        tuple((data_dir / name).absolute() for name in _NO_DATASETS),
        cfg.retry_seconds,
    )
    total_tokens = None if cfg.total_tokens == "all" else cfg.total_tokens
    is_share = is_own_text(cfg.dataset) and not cfg.sets_val_tokens
    return DatasetSpec(
        source,
        cfg.dataset_name,
        total_tokens,
        cfg.val_tokens,
        cfg.shard_size,
        cfg.skip_bad,
        settings.model.context_length + 1 if is_share else 0,
    )
