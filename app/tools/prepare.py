"""`prepare`: the pipeline's arguments from the settings."""

import gc
import os

from app.prepare.spec import DatasetSpec, TextSource
from app.settings.prepare import PrepareSettings
from app.settings.settings import Settings


def prepare(settings: Settings) -> None:
    """Turn text into token shards; see app.prepare.pipeline.prepare."""
    # Imported modules are never garbage; looking for some among them takes 30 ms of a start.
    gc.set_threshold(100_000)
    from app.prepare.pipeline import prepare as run_pipeline

    cfg, token = settings.prepare, settings.general.hf_token
    run_pipeline(
        dataset_spec(cfg),
        settings.prepare_dir,
        workers=(os.cpu_count() or 1) if cfg.workers == "auto" else cfg.workers,
        hf_token=token.get_secret_value() if token else None,
    )


def dataset_spec(cfg: PrepareSettings) -> DatasetSpec:
    """Return the dataset that the settings describe."""
    source = TextSource(
        cfg.dataset,
        cfg.config,
        cfg.dataset_revision,
        cfg.split,
        cfg.text_column,
        cfg.shuffle_files,
        cfg.retry_seconds,
    )
    total_tokens = None if cfg.total_tokens == "all" else cfg.total_tokens
    return DatasetSpec(source, cfg.dataset_name, total_tokens, cfg.val_tokens, cfg.shard_size)
