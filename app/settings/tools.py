"""The settings of the commands that use a trained model."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from app.settings.types import Count, Group, Location, Number, count_or


class SampleSettings(Group):
    """Text from a trained model."""

    model_config = SettingsConfigDict(env_prefix="SAMPLE_")

    prompt: str = ""
    """text to continue; by default a new document"""
    prompt_file: str | None = None
    """file with the prompt of `sample`; -: standard input"""
    num_samples: Count = Field(2, ge=1, le=1000)
    """texts to generate"""
    max_tokens: Count = Field(200, ge=1)
    """largest number of tokens in a text"""
    temperature: Number = Field(0.8, ge=0, le=100)
    """0: always the likeliest token; 1: the model's own odds"""
    top_k: Count = Field(50, ge=0)
    """draw from the k likeliest tokens; 0: from all"""
    seed: Count = Field(0, ge=0, lt=2**32)
    """random seed; the same seed gives the same text"""
    step: Count | None = Field(None, ge=0)
    """step of the checkpoint to use; by default the latest"""


class PlaygroundSettings(Group):
    """The page on which to try a model."""

    model_config = SettingsConfigDict(env_prefix="PLAYGROUND_")

    host: str = "127.0.0.1"
    """address to listen on, and the name that browsers must use; the default serves this machine
    only"""
    port: Count = Field(8000, ge=0, lt=65536)
    """port to listen on; 0: any free port"""


class ReportSettings(Group):
    """The page and pictures of how runs learned."""

    model_config = SettingsConfigDict(env_prefix="REPORT_")

    out: Location | None = None
    """folder to write, below DATA_DIR; by default report in the run's folder, and
    reports/ONE+TWO for several runs"""
    host: str = "127.0.0.1"
    """address that `report --serve` listens on, and the name that browsers must use; the default
    serves this machine only"""
    port: Count = Field(8001, ge=0, lt=65536)
    """port that `report --serve` listens on; 0: any free port"""


class EvaluateSettings(Group):
    """The loss on text that the model has not seen."""

    model_config = SettingsConfigDict(env_prefix="EVALUATE_")

    split: Literal["val", "train"] = "val"
    """val: held-out text; train: training text"""
    tokens: Annotated[
        int | Literal["auto", "all", "published"], count_or("auto", "all", "published")
    ] = "auto"
    """tokens to measure on, from the start of the split; auto: as many as train measured on, else
    all; published: the first 10,485,760, as in published results on FineWeb"""
    step: Count | None = Field(None, ge=0)
    """step of the checkpoint to use; by default the latest"""


class ExportSettings(Group):
    """The model as a folder that transformers can load."""

    model_config = SettingsConfigDict(env_prefix="EXPORT_")

    out_dir: Location | None = None
    """folder to write, below DATA_DIR; by default export in the run's folder"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights; bfloat16 halves the file and rounds them"""
    step: Count | None = Field(None, ge=0)
    """step of the checkpoint to use; by default the latest"""
