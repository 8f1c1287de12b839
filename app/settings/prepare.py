"""The settings of `prepare`."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import SettingsConfigDict

from app.formats import short_count
from app.settings.types import (
    Count,
    Group,
    Location,
    Number,
    Seconds,
    count_or,
    parse_count_or_share,
    parse_encoding,
    parse_list,
)


class PrepareSettings(Group):
    """From text to token shards."""

    model_config = SettingsConfigDict(env_prefix="PREPARE_")

    dataset: str = "HuggingFaceFW/fineweb"
    """dataset id on the Hugging Face Hub; or a local file, folder or glob of .txt .md .py .jsonl
    .ndjson .parquet (also .gz .bz2 .xz .zst); or stdlib: Python's standard library"""
    dataset_config: str | None = "sample-10BT"
    """configuration of a Hub dataset; another DATASET has its own default"""
    dataset_revision: str = "main"
    """branch, tag or commit of a Hub dataset"""
    split: str = "train"
    """split of a Hub dataset"""
    text_column: str = "text"
    """column that holds the text"""
    shuffle_files: bool = True
    """read local files in a fixed random order instead of by name"""
    encoding: Annotated[str, BeforeValidator(parse_encoding)] = ""
    """encoding of local text files without a byte order mark, such as cp1252; by default UTF-8"""
    skip_bad: Annotated[Number, BeforeValidator(parse_count_or_share), Field(ge=0, le=1e18)] = 0
    """how many lines and files that cannot be read as text are left out before it is an error; a
    count, or a share such as 0.1%"""
    total_tokens: Annotated[int | Literal["all"], count_or("all")] = 20_000_000
    """training tokens, or all; held-out tokens come on top"""
    val_tokens: Count = Field(1_048_576, ge=0)
    """held-out tokens, taken from the start of the text; 0: none. By default at most a twentieth of
    local text"""
    shard_size: Count = Field(100_000_000, gt=0, lt=2**31)
    """tokens per shard; the last shard may have fewer"""
    out_dir: Location | None = None
    """dataset folder, below DATA_DIR; by default named after dataset and tokens: fineweb20M,
    fineweb10B"""
    workers: Annotated[int | Literal["auto"], count_or("auto", at_most=1024)] = "auto"
    """tokenizer threads; auto: one per core"""
    retry_seconds: Annotated[tuple[Seconds, ...], BeforeValidator(parse_list)] = (1, 3, 10, 30, 60)
    """seconds to wait before each retry when the Hub does not answer"""

    @property
    def config(self) -> str | None:
        """Return the Hub configuration; None for the dataset's own default."""
        default = type(self).model_fields["dataset"].default
        applies = self.dataset == default or "dataset_config" in self.model_fields_set
        return self.dataset_config if applies else None

    @property
    def sets_val_tokens(self) -> bool:
        """Return True if the number of held-out tokens is set, and not the default."""
        return "val_tokens" in self.model_fields_set

    @property
    def dataset_name(self) -> str:
        """Return the short name that the shards carry: HuggingFaceFW/fineweb -> fineweb."""
        last = self.dataset.rstrip("/").rsplit("/", 1)[-1]
        stem = last.split(".")[0] if "." in last.strip(".") else last
        return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "text"

    @property
    def dataset_dir(self) -> Path:
        """Return the folder of the shards, relative to DATA_DIR."""
        if self.out_dir is not None:
            return self.out_dir
        if self.total_tokens != "all":
            return Path(f"{self.dataset_name}{short_count(self.total_tokens)}")
        sample = re.fullmatch(r"sample-(\d+[BMK])T", self.config or "")
        return Path(f"{self.dataset_name}{sample[1] if sample else ''}")
