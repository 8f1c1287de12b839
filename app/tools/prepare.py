"""`prepare`: the pipeline's arguments from the settings."""

import gc
import os
from pathlib import Path

from app.data.hellaswag import provide_questions
from app.errors import UserError
from app.prepare.model_folder import hub_model
from app.prepare.spec import DatasetSpec, TextSource
from app.settings.settings import Settings


def prepare(settings: Settings) -> None:
    """Turn text into token shards; see app.prepare.pipeline.prepare."""
    # Imported modules are never garbage; looking for some among them takes 30 ms of a start.
    gc.set_threshold(100_000)
    from app.prepare.pipeline import prepare as run_pipeline

    cfg, token = settings.prepare, settings.general.hf_token
    secret = token.get_secret_value() if token else None
    check_out_dir(settings.prepare_dir, settings.general.data_dir)
    context_length = settings.model.context_length
    if 0 < cfg.val_tokens < context_length:
        print(
            f"warning: {cfg.val_tokens:,} held-out tokens are less than a sequence of "
            f"{context_length:,} (MODEL_CONTEXT_LENGTH): train cannot measure a held-out loss on "
            f"them; set PREPARE_VAL_TOKENS to {context_length:,} or more",
            flush=True,
        )
    if settings.train.hellaswag_every and settings.train.hellaswag_file is None:
        # The container of train has no network.
        provide_questions(settings.hellaswag_file)
    if hub_id := hub_model(settings.train.init_from or "", settings.general.data_dir):
        from app.prepare.hub_client import Repository
        from app.prepare.hub_model import download_model

        # As for the questions.
        repository, cache_dir = Repository(*hub_id, "model"), settings.general.data_dir / "cache"
        download_model(repository, cache_dir, secret, cfg.retry_seconds)
    run_pipeline(
        dataset_spec(settings),
        settings.prepare_dir,
        workers=(os.cpu_count() or 1) if cfg.workers == "auto" else cfg.workers,
        hf_token=secret,
    )


def check_out_dir(folder: Path, data_dir: Path) -> None:
    """Raise UserError for a folder that holds something else: DATA_DIR, its runs/ and cache/."""
    folder, data_dir = folder.resolve(), data_dir.resolve()
    taken = (data_dir / "runs", data_dir / "cache")
    if folder == data_dir or any(folder.is_relative_to(place) for place in taken):
        raise UserError(
            f"the dataset's folder {folder} is {data_dir}, or in its runs/ or cache/",
            "set PREPARE_OUT_DIR to another name",
        )


def dataset_spec(settings: Settings) -> DatasetSpec:
    """Return the dataset that the settings describe."""
    cfg, data_dir = settings.prepare, settings.general.data_dir
    source = TextSource(
        cfg.dataset,
        cfg.config,
        cfg.dataset_revision,
        cfg.split,
        cfg.text_column,
        cfg.shuffle_files,
        cfg.encoding,
        ((data_dir / "runs").absolute(), (data_dir / "cache").absolute()),
        cfg.retry_seconds,
    )
    total_tokens = None if cfg.total_tokens == "all" else cfg.total_tokens
    return DatasetSpec(
        source, cfg.dataset_name, total_tokens, cfg.val_tokens, cfg.shard_size, cfg.skip_bad
    )
