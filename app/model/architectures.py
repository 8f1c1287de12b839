"""The architectures by name: the only module that knows more than one."""

from typing import Any

import torch
from torch import Tensor

from app.model.gpt import GPT, GPTConfig
from app.model.huggingface import gpt2_config, gpt2_weights, qwen3_config, qwen3_weights
from app.model.language_model import LanguageModel, ModelConfig
from app.model.qwen3 import Qwen3, Qwen3Config

_CONFIGS: dict[str, type[ModelConfig]] = {"gpt2": GPTConfig, "qwen3": Qwen3Config}


def build_config(shape: dict[str, Any]) -> ModelConfig:
    """Return the config of a shape: its `architecture`, and a value for each of that one's fields.

    A GPT-2's `activation` may be left out.

    Raises:
        TypeError, ValueError: it is none, or no model can have it.
    """
    fields = dict(shape)
    architecture = fields.pop("architecture")
    if architecture not in _CONFIGS:
        raise ValueError(f"there is no architecture {architecture!r}")
    config = _CONFIGS[architecture]
    if config is GPTConfig:
        fields.setdefault("activation", "gelu")
    # The default of a value that is missing may not be what the model was trained with.
    if differing := fields.keys() ^ config.__dataclass_fields__.keys():
        raise ValueError(f"only one of the two has {', '.join(sorted(differing))} of a model")
    return config(**fields)


def build_model(
    config: ModelConfig, *, bf16_residual: bool = False, zero_init: bool = False
) -> LanguageModel:
    """Return a new model of the config's architecture; the arguments are those of its class."""
    if isinstance(config, Qwen3Config):
        return Qwen3(config, bf16_residual=bf16_residual, zero_init=zero_init)
    assert isinstance(config, GPTConfig)
    return GPT(config, bf16_residual=bf16_residual, zero_init=zero_init)


def to_huggingface(
    model: LanguageModel, dtype: torch.dtype, end_of_text: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of config.json, and the weights, of transformers' own class of model.

    Args:
        model: the model to export.
        dtype: dtype of the stored weights.
        end_of_text: token id that begins and ends documents.

    Raises:
        TypeError: transformers has no class for it.
    """
    common = {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(model, Qwen3):
        return qwen3_config(model) | common, qwen3_weights(model, dtype)
    if not isinstance(model, GPT):
        raise TypeError(f"it has no class for {type(model).__name__}")
    return gpt2_config(model) | common, gpt2_weights(model, dtype)
