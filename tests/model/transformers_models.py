"""Models that transformers itself writes, with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CONTEXT_LENGTH = 64
VOCAB_SIZE = 50257
GPT2 = {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": CONTEXT_LENGTH}
QWEN3 = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_LENGTH,
}


def gpt2(**changes: Any) -> PreTrainedModel:
    """A GPT-2 whose biases and norms are not those of the start, where a lost one is not seen."""
    return _away_from_zero(GPT2LMHeadModel(GPT2Config(**(GPT2 | changes))))


def qwen3(**changes: Any) -> PreTrainedModel:
    return _away_from_zero(Qwen3ForCausalLM(Qwen3Config(**(QWEN3 | changes))))


def _away_from_zero(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: PreTrainedModel | Path) -> torch.Tensor:
    """The logits of a fixed text, [1, CONTEXT_LENGTH, VOCAB_SIZE], by transformers."""
    if isinstance(model, Path):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        return model(tokens()).logits


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB_SIZE, (1, CONTEXT_LENGTH), generator=generator)
