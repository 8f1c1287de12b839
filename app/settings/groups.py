"""Every setting: its type, default, bounds and meaning.

A setting `field` of a group with prefix `PREFIX_` is the variable `PREFIX_FIELD` and the flag
`--field`. Where values come from, and in which order, is `app.settings.sources`.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from app.formats import short_count
from app.settings.counts import Count, CountOrAll, count_or
from app.settings.types import (
    Beta,
    Group,
    Location,
    Number,
    RunName,
    Wait,
    listed,
    pair,
    truth,
)


class GeneralSettings(Group):
    """Where everything lives."""

    data_dir: Location = Field(
        Path("data"), description="datasets, runs/ and cache/ live below this folder"
    )
    recipe: str | None = Field(
        None, description="take settings from recipes/NAME.env, or from a file: ./NAME.env"
    )
    hf_token: SecretStr | None = Field(
        None, description="token of the Hugging Face hub; never printed or stored"
    )


class PrepareSettings(Group):
    """Text to token shards."""

    model_config = SettingsConfigDict(env_prefix="PREPARE_")

    dataset: str = Field(
        "HuggingFaceFW/fineweb",
        description="hub id; or a local file, folder or glob of .txt .md .py .jsonl .parquet "
        "(also .gz .bz2 .xz .zst); or stdlib, Python's own library",
    )
    dataset_config: str | None = Field(
        "sample-10BT",
        description="configuration of a hub dataset; another DATASET has its own by default",
    )
    dataset_revision: str = Field("main", description="branch, tag or commit of a hub dataset")
    split: str = Field("train", description="split of a hub dataset")
    text_column: str = Field("text", description="column that holds the text")
    shuffle_files: bool = Field(
        True, description="read local files in a fixed random order, not by name"
    )
    total_tokens: CountOrAll = Field(
        20_000_000, description="training tokens, or all; held-out tokens come on top"
    )
    val_tokens: Count = Field(
        1_048_576, ge=0, description="held-out tokens, taken from the start; 0 for none"
    )
    shard_size: Count = Field(
        100_000_000, gt=0, lt=2**31, description="tokens in each shard but the last"
    )
    out_dir: Location | None = Field(
        None,
        description="dataset folder, below DATA_DIR; by default named after dataset and tokens: "
        "fineweb20M, fineweb10B",
    )
    workers: Annotated[int | Literal["auto"], count_or("auto", at_most=1024)] = Field(
        "auto", description="threads that tokenize; auto: one per core"
    )
    retry_seconds: Annotated[tuple[Wait, ...], BeforeValidator(listed)] = Field(
        (1, 3, 10, 30, 60),
        description="waits before each new try when the hub does not answer",
    )

    @property
    def config(self) -> str | None:
        """The hub configuration; None for a dataset's own default."""
        default = type(self).model_fields["dataset"].default
        known = self.dataset == default or "dataset_config" in self.model_fields_set
        return self.dataset_config if known else None

    @property
    def dataset_name(self) -> str:
        """The dataset's short name, which its shards carry: HuggingFaceFW/fineweb -> fineweb."""
        last = self.dataset.rstrip("/").rsplit("/", 1)[-1]
        stem = last.split(".")[0] if "." in last.strip(".") else last
        return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "text"

    @property
    def dataset_dir(self) -> Path:
        """Where the shards go, relative to DATA_DIR."""
        if self.out_dir is not None:
            return self.out_dir
        if self.total_tokens != "all":
            return Path(f"{self.dataset_name}{short_count(self.total_tokens)}")
        sample = re.fullmatch(r"sample-(\d+[BMK])T", self.config or "")
        return Path(f"{self.dataset_name}{sample[1] if sample else ''}")


class ModelSettings(Group):
    """The GPT; the defaults are GPT-2 124M."""

    model_config = SettingsConfigDict(env_prefix="MODEL_", protected_namespaces=())

    context_length: Count = Field(1024, ge=2, le=65536, description="tokens a window holds (T)")
    vocab_size: Count = Field(
        50257, ge=50257, le=50257, description="rows of the embedding: the tokens of GPT-2's BPE"
    )
    num_layers: Count = Field(12, ge=1, description="transformer blocks")
    embd_size: Count = Field(768, ge=1, description="width of the residual stream")
    num_heads: Count = Field(12, ge=1, description="attention heads; must divide the width")


class TrainSettings(Group):
    """Token shards to a trained GPT."""

    model_config = SettingsConfigDict(env_prefix="TRAIN_")

    dataset_dir: Location | None = Field(
        None, description="dataset folder, below DATA_DIR; by default where prepare writes"
    )
    run_name: RunName | None = Field(
        None,
        description="the run's folder below DATA_DIR/runs; by default the dataset folder's name",
    )
    tokens_per_step: Count = Field(
        524_288, gt=0, lt=2**31, description="tokens of one optimizer step"
    )
    micro_batch_size: Annotated[int | Literal["auto"], count_or("auto")] = Field(
        "auto", description="windows in one forward pass; auto: chosen for the device"
    )
    max_steps: Count = Field(38, gt=0, description="optimizer steps of the whole run")
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon: for the blocks' matrices, AdamW for the rest; or AdamW for all"
    )
    shard_optimizer: bool = Field(
        False,
        description="each process keeps a part of the optimizer's state, not all of it: for models "
        "whose state is too large for one GPU",
    )
    learning_rate: Number = Field(3.6e-3, gt=0, le=1, description="highest learning rate")
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(pair)] = Field(
        (0.9, 0.95), description="AdamW's decay of the mean and of the square"
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="after the warm-up: constant, cosine, linear (both decay)"
    )
    warmup_steps: Annotated[int | Literal["auto"], count_or("auto", at_least=0)] = Field(
        "auto", description="steps over which the rate grows linearly; auto: a hundredth of the run"
    )
    min_lr_ratio: Number = Field(
        0.1, ge=0, le=1, description="rate at the end of a decay, as a part of the highest"
    )
    weight_decay: Number = Field(0.1, ge=0, le=1, description="decoupled weight decay")
    weight_decay_on: Literal["matrices", "all"] = Field(
        "matrices", description="matrices: not on biases and layer norms; all: on every tensor"
    )
    grad_clip: Number = Field(1.0, ge=0, description="largest gradient norm; 0 turns clipping off")
    shuffle: bool = Field(True, description="visit the windows in random order, new each epoch")
    seed: Count = Field(0, ge=0, lt=2**32, description="of the weights and of the order")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one")
    precision: Literal["auto", "bf16", "float32", "fp8"] = Field(
        "auto",
        description="auto: bf16 autocast where that is faster, else float32; fp8: bf16, with the "
        "output layer in 8-bit floats on GPUs that have them",
    )
    residual: Literal["bf16", "float32"] = Field(
        "bf16",
        description="dtype of the residual stream where training computes in bf16: bf16 is faster "
        "and takes less memory, float32 is the original's",
    )
    compile: bool = Field(
        True, description="compile the model; false starts sooner and trains more slowly"
    )
    deterministic: Annotated[Literal["auto", "true", "false"], BeforeValidator(truth)] = Field(
        "auto", description="bit-identical from run to run; auto: on a CPU only"
    )
    val_every: Count = Field(
        250, ge=0, description="steps between held-out losses, also at the end; 0 for none"
    )
    val_tokens: Count = Field(1_048_576, gt=0, description="held-out tokens of one measurement")
    sample_every: Count = Field(
        250, ge=0, description="steps between samples of text, also at the end; 0 for none"
    )
    checkpoint_every: Count = Field(
        250, ge=0, description="steps between checkpoints, also at the end; 0 for the end only"
    )
    keep_checkpoints: Count = Field(2, ge=1, description="latest checkpoints that are kept")
    processes: Annotated[int | Literal["auto"], count_or("auto", at_most=1024)] = Field(
        "auto", description="processes that train together; auto: one per GPU, on a CPU one"
    )
    max_restarts: Count = Field(
        3, ge=0, description="how often all processes begin again because one has died"
    )
    rank_timeout_seconds: Number = Field(
        600, gt=0, le=86400, description="a process that does not answer for so long counts as dead"
    )
    price_per_hour: Number | None = Field(
        None, ge=0, description="what the machine costs an hour, in any currency, to show the cost"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue the run if it exists; never: refuse an existing run"
    )


class SampleSettings(Group):
    """The text a model writes."""

    model_config = SettingsConfigDict(env_prefix="SAMPLE_")

    prompt: str = Field("", description="text to continue; by default a new document")
    prompt_file: str | None = Field(
        None, description="take the prompt of `sample` from this file; - for standard input"
    )
    num_samples: Count = Field(2, ge=1, le=1000, description="texts to write")
    max_tokens: Count = Field(200, ge=1, description="tokens to write, at most")
    temperature: Number = Field(
        0.8, ge=0, le=100, description="0: always the likeliest token; 1: as the model says"
    )
    top_k: Count = Field(50, ge=0, description="draw from the k likeliest tokens; 0: from all")
    seed: Count = Field(0, ge=0, lt=2**32, description="the same seed writes the same text")
    step: Count | None = Field(None, ge=0, description="checkpoint to use; by default the last")


class PlaygroundSettings(Group):
    """The page on which to try a model."""

    model_config = SettingsConfigDict(env_prefix="PLAYGROUND_")

    host: str = Field(
        "127.0.0.1",
        description="address to listen at, and the name that browsers must use; the default is for "
        "this machine only",
    )
    port: Count = Field(8000, ge=0, lt=65536, description="port to listen at; 0: any that is free")


class EvaluateSettings(Group):
    """The loss on text the model has not seen."""

    model_config = SettingsConfigDict(env_prefix="EVALUATE_")

    split: Literal["val", "train"] = Field("val", description="val: held-out text; or train")
    tokens: Annotated[int | Literal["all", "published"], count_or("all", "published")] = Field(
        "all",
        description="tokens to measure on, from the start; published: the first 10,485,760, as "
        "published figures of FineWeb have it",
    )
    step: Count | None = Field(None, ge=0, description="checkpoint to use; by default the last")


class ExportSettings(Group):
    """The model as a folder that transformers loads."""

    model_config = SettingsConfigDict(env_prefix="EXPORT_")

    out_dir: Location | None = Field(
        None, description="folder to write, below DATA_DIR; by default export in the run's folder"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights; bfloat16 halves the file and rounds them"
    )
    step: Count | None = Field(None, ge=0, description="checkpoint to use; by default the last")


GROUPS: dict[str, type[Group]] = {
    "general": GeneralSettings,
    "prepare": PrepareSettings,
    "model": ModelSettings,
    "train": TrainSettings,
    "sample": SampleSettings,
    "playground": PlaygroundSettings,
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
}
VARIABLES = {variable: group for group in GROUPS.values() for variable in group.variables()}
