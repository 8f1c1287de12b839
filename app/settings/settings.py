"""All settings of one command, the conflicts between them, and the folders they name.

A setting `field` of a group with prefix `PREFIX_` is the variable `PREFIX_FIELD` and the flag
`--field`. Where the values come from, and in which order, is in `app.settings.sources`.
"""

from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, SecretStr

from app.settings.prepare import PrepareSettings
from app.settings.tools import (
    EvaluateSettings,
    ExportSettings,
    PlaygroundSettings,
    ReportSettings,
    SampleSettings,
)
from app.settings.train import ModelSettings, TrainSettings
from app.settings.types import Group, Location

# torch._scaled_mm takes matrices whose sides are multiples of this.
_FP8_MULTIPLE = 16


class GeneralSettings(Group):
    """Settings that every command needs."""

    data_dir: Location = Path("data")
    """folder of the datasets, of runs/ and of cache/"""
    recipe: str | None = None
    """recipe to take settings from, such as demo; or a file: ./NAME.env"""
    hf_token: SecretStr | None = None
    """access token of the Hugging Face Hub; never printed or stored"""


class Settings(BaseModel):
    """All settings of one command. They never change."""

    model_config = ConfigDict(frozen=True)

    general: GeneralSettings
    prepare: PrepareSettings
    model: ModelSettings
    train: TrainSettings
    sample: SampleSettings
    playground: PlaygroundSettings
    report: ReportSettings
    evaluate: EvaluateSettings
    export: ExportSettings

    def conflicts(self) -> dict[tuple[str, str], str]:
        """Map each pair of conflicting variables to the reason and the remedy."""
        train, width, length = self.train, self.model.embd_size, self.model.context_length
        multiples = {
            ("TRAIN_TOKENS_PER_STEP", "MODEL_CONTEXT_LENGTH"): (train.tokens_per_step, length)
        }
        if self.model.architecture == "gpt2":
            multiples["MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"] = (width, self.model.num_heads)
        if train.precision == "fp8":
            multiples["TRAIN_PRECISION", "MODEL_CONTEXT_LENGTH"] = (length, _FP8_MULTIPLE)
            multiples["TRAIN_PRECISION", "MODEL_EMBD_SIZE"] = (width, _FP8_MULTIPLE)
        conflicts = _conflicts_of(self.model) | {
            names: _not_a_multiple(number, divisor)
            for names, (number, divisor) in multiples.items()
            if number % divisor
        }
        if train.precision == "fp8" and not train.compile:
            conflicts["TRAIN_PRECISION", "TRAIN_COMPILE"] = "fp8 needs compiled code"
        if train.warmup_steps != "auto" and 0 < train.max_steps <= train.warmup_steps:
            reason = "the warm-up must be shorter than the run"
            conflicts["TRAIN_WARMUP_STEPS", "TRAIN_MAX_STEPS"] = reason
        if self.sample.prompt and self.sample.prompt_file:
            reason = "only one of them can be the prompt; the flag --prompt= clears a recipe's"
            conflicts["SAMPLE_PROMPT", "SAMPLE_PROMPT_FILE"] = reason
        if self.evaluate.tokens == "published" and self.evaluate.split != "val":
            reason = "published results are on held-out text"
            conflicts["EVALUATE_TOKENS", "EVALUATE_SPLIT"] = reason
        return conflicts

    @property
    def prepare_dir(self) -> Path:
        """Return the dataset folder that prepare writes."""
        return self.general.data_dir / self.prepare.dataset_dir

    @property
    def train_dataset_dir(self) -> Path:
        """Return the dataset folder that train reads."""
        return self.general.data_dir / (self.train.dataset_dir or self.prepare.dataset_dir)

    @property
    def run_dir(self) -> Path:
        """Return the run's folder."""
        return self.general.data_dir / "runs" / (self.train.run_name or self.train_dataset_dir.name)

    @property
    def hellaswag_file(self) -> Path:
        """Return the file of HellaSwag's questions; unless it is named, it may be downloaded."""
        name = self.train.hellaswag_file or Path("cache", "hellaswag_val.jsonl")
        return self.general.data_dir / name

    @property
    def export_dir(self) -> Path:
        """Return the folder that export writes."""
        out_dir = self.export.out_dir
        return self.general.data_dir / out_dir if out_dir else self.run_dir / "export"

    def public(self) -> dict[str, Any]:
        """Return everything but secrets, as JSON values."""
        return self.model_dump(mode="json", exclude={"general": {"hf_token"}})


GROUPS = {name: cast(type[Group], it.annotation) for name, it in Settings.model_fields.items()}
VARIABLES = {variable: group for group in GROUPS.values() for variable in group.variables()}


def _conflicts_of(model: ModelSettings) -> dict[tuple[str, str], str]:
    """Map each pair of variables that an architecture cannot have to the reason and the remedy."""
    conflicts, head_dim = {}, model.embd_size / model.num_heads
    if model.architecture == "gpt2":
        if model.head_dim not in ("auto", head_dim):
            conflicts["MODEL_ARCHITECTURE", "MODEL_HEAD_DIM"] = (
                f"gpt2 divides its width among its heads, {head_dim:.4g} each; leave it on auto"
            )
        if model.tie_embeddings == "false":
            conflicts["MODEL_ARCHITECTURE", "MODEL_TIE_EMBEDDINGS"] = (
                "the output layer of gpt2 is its embedding; qwen3 can have its own"
            )
        return conflicts
    if model.activation != "gelu":
        reason = "the MLP of qwen3 has SwiGLU; leave the activation out"
        conflicts["MODEL_ARCHITECTURE", "MODEL_ACTIVATION"] = reason
    if model.head_dim == "auto" and head_dim % 2:
        conflicts["MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"] = (
            f"a head of {head_dim:.4g}, and qwen3 turns pairs of its values: set an even "
            "MODEL_HEAD_DIM"
        )
    elif model.head_dim != "auto" and model.head_dim % 2:
        conflicts["MODEL_ARCHITECTURE", "MODEL_HEAD_DIM"] = (
            "qwen3 turns pairs of a head's values: it must be even"
        )
    return conflicts


def _not_a_multiple(number: int, divisor: int) -> str:
    above = (number // divisor + 1) * divisor
    multiples = f"{above - divisor} and {above} are" if number > divisor else f"{divisor} is"
    return f"{number} is not a multiple of {divisor}; {multiples}"
