"""All settings of one command, what contradicts in them, and the folders they name."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from app.settings.groups import (
    EvaluateSettings,
    ExportSettings,
    GeneralSettings,
    ModelSettings,
    PlaygroundSettings,
    PrepareSettings,
    SampleSettings,
    TrainSettings,
)

# torch._scaled_mm takes matrices whose sides are multiples of it.
_FP8_MULTIPLE = 16


class Settings(BaseModel):
    """All settings of one command; they never change."""

    model_config = ConfigDict(frozen=True)

    general: GeneralSettings
    prepare: PrepareSettings
    model: ModelSettings
    train: TrainSettings
    sample: SampleSettings
    playground: PlaygroundSettings
    evaluate: EvaluateSettings
    export: ExportSettings

    def conflicts(self) -> dict[tuple[str, str], str]:
        """Two variables that do not go together -> why, and what would."""
        tokens, length = self.train.tokens_per_step, self.model.context_length
        width, heads = self.model.embd_size, self.model.num_heads
        warmup = self.train.warmup_steps
        found = {}
        if width % heads:
            found["MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"] = _not_a_multiple(width, heads)
        if warmup != "auto" and 0 < self.train.max_steps <= warmup:
            found["TRAIN_WARMUP_STEPS", "TRAIN_MAX_STEPS"] = (
                "the warm-up leaves no step at the full rate"
            )
        if self.sample.prompt and self.sample.prompt_file:
            found["SAMPLE_PROMPT", "SAMPLE_PROMPT_FILE"] = (
                "only one of them can be the prompt; the flag --prompt= clears a recipe's"
            )
        if tokens % length:
            found["TRAIN_TOKENS_PER_STEP", "MODEL_CONTEXT_LENGTH"] = _not_a_multiple(tokens, length)
        if self.train.precision == "fp8":
            found |= self._not_for_fp8()
        if self.evaluate.tokens == "published" and self.evaluate.split != "val":
            found["EVALUATE_TOKENS", "EVALUATE_SPLIT"] = "published figures are of held-out text"
        return found

    def _not_for_fp8(self) -> dict[tuple[str, str], str]:
        found = {
            ("TRAIN_PRECISION", f"MODEL_{name.upper()}"): _not_a_multiple(side, _FP8_MULTIPLE)
            for name, side in self.model.model_dump(include={"context_length", "embd_size"}).items()
            if side % _FP8_MULTIPLE
        }
        if not self.train.compile:
            found["TRAIN_PRECISION", "TRAIN_COMPILE"] = "fp8 needs compiled code"
        return found

    @property
    def prepare_dir(self) -> Path:
        """Where prepare writes."""
        return self.general.data_dir / self.prepare.dataset_dir

    @property
    def train_dataset_dir(self) -> Path:
        """Where train reads."""
        return self.general.data_dir / (self.train.dataset_dir or self.prepare.dataset_dir)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.general.data_dir / "runs" / (self.train.run_name or self.train_dataset_dir.name)

    @property
    def export_dir(self) -> Path:
        """Where export writes."""
        out_dir = self.export.out_dir
        return self.general.data_dir / out_dir if out_dir else self.run_dir / "export"

    def public(self) -> dict[str, Any]:
        """Everything but secrets, as JSON values."""
        return self.model_dump(mode="json", exclude={"general": {"hf_token"}})


def _not_a_multiple(number: int, divisor: int) -> str:
    above = (number // divisor + 1) * divisor
    multiples = f"{above - divisor} and {above} are" if number > divisor else f"{divisor} is"
    return f"{number} is not a multiple of {divisor}; {multiples}"
