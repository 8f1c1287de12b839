"""The settings of the commands that use a trained model."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from app.settings.types import Count, Group, Location, Number, count_or

_STEP = "step of the checkpoint to use; by default the latest"


class SampleSettings(Group):
    """Text from a trained model."""

    model_config = SettingsConfigDict(env_prefix="SAMPLE_")

    prompt: str = Field("", description="text to continue; by default a new document")
    prompt_file: str | None = Field(
        None, description="file with the prompt of `sample`; -: standard input"
    )
    num_samples: Count = Field(2, ge=1, le=1000, description="texts to generate")
    max_tokens: Count = Field(200, ge=1, description="largest number of tokens in a text")
    temperature: Number = Field(
        0.8, ge=0, le=100, description="0: always the likeliest token; 1: the model's own odds"
    )
    top_k: Count = Field(50, ge=0, description="draw from the k likeliest tokens; 0: from all")
    seed: Count = Field(
        0, ge=0, lt=2**32, description="random seed; the same seed gives the same text"
    )
    step: Count | None = Field(None, ge=0, description=_STEP)


class PlaygroundSettings(Group):
    """The page on which to try a model."""

    model_config = SettingsConfigDict(env_prefix="PLAYGROUND_")

    host: str = Field(
        "127.0.0.1",
        description="address to listen on, and the name that browsers must use; the default "
        "serves this machine only",
    )
    port: Count = Field(8000, ge=0, lt=65536, description="port to listen on; 0: any free port")


class EvaluateSettings(Group):
    """The loss on text that the model has not seen."""

    model_config = SettingsConfigDict(env_prefix="EVALUATE_")

    split: Literal["val", "train"] = Field(
        "val", description="val: held-out text; train: training text"
    )
    tokens: Annotated[int | Literal["all", "published"], count_or("all", "published")] = Field(
        "all",
        description="tokens to measure on, from the start of the split; published: the first "
        "10,485,760, as in published results on FineWeb",
    )
    step: Count | None = Field(None, ge=0, description=_STEP)


class ExportSettings(Group):
    """The model as a folder that transformers loads."""

    model_config = SettingsConfigDict(env_prefix="EXPORT_")

    out_dir: Location | None = Field(
        None, description="folder to write, below DATA_DIR; by default export in the run's folder"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the weights; bfloat16 halves the file and rounds them"
    )
    step: Count | None = Field(None, ge=0, description=_STEP)
