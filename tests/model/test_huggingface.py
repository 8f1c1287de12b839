"""Converted models in the real transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.model.gpt import GPT, GPTConfig
from app.model.huggingface import gpt2_config, gpt2_weights
from tests.model.generation import generate

SHAPES = (
    GPTConfig(context_length=64, num_layers=1, embd_size=8, num_heads=1),
    GPTConfig(context_length=100, num_layers=3, embd_size=48, num_heads=6),
    GPTConfig(context_length=128, num_layers=7, embd_size=96, num_heads=3),
)
GPT2_124M = GPTConfig()


def real_text(count: int) -> Tensor:
    """Tokens of this program's own source, int64 [1, count]."""
    source = Path(__file__).parents[2] / "app"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.py")))
    return torch.from_numpy(Tokenizer().encode(text)[:count].astype(np.int64))[None]


def converted(model: GPT, folder: Path, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    save_file(gpt2_weights(model, dtype), folder / "model.safetensors", {"format": "pt"})
    config = gpt2_config(model, dtype, END_OF_TEXT)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded


def away_from_zero(config: GPTConfig) -> GPT:
    """A model whose biases and norms are not those of the start, where a lost one is not seen."""
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_layers} layers")
@torch.no_grad()
def test_logits_are_the_same(shape: GPTConfig, tmp_path: Path) -> None:
    model = away_from_zero(shape)
    tokens = real_text(shape.context_length)
    actual, expected = converted(model, tmp_path)(tokens).logits, model(tokens)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-4


@torch.no_grad()
def test_logits_of_124m_are_the_same_over_the_whole_context(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(GPT2_124M)
    theirs = converted(model, tmp_path)
    assert theirs.num_parameters() == model.num_parameters() == 124_439_808
    tokens = real_text(1024)
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert (
        greedy(theirs, tokens[:, :50], 10)
        == generate(model, tokens[:, :50], 10, temperature=0).tolist()
    )


def greedy(model: GPT2LMHeadModel, prompt: Tensor, max_tokens: int) -> list[list[int]]:
    """What transformers generates, whether or not documents end."""
    model.generation_config.eos_token_id = None
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=END_OF_TEXT,
    )
    assert isinstance(written, Tensor)
    return written.tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_layers} layers")
def test_greedy_text_is_the_same_to_the_end_of_the_context(
    shape: GPTConfig, tmp_path: Path
) -> None:
    model = away_from_zero(shape)
    prompt = real_text(8)
    count = shape.context_length - 8
    expected = generate(model, prompt, count, temperature=0).tolist()
    assert greedy(converted(model, tmp_path), prompt, count) == expected


@torch.no_grad()
def test_bfloat16_rounds_the_scaled_weights_once(tmp_path: Path) -> None:
    model = away_from_zero(SHAPES[1])
    exact = gpt2_weights(model, torch.float32)
    for name, value in gpt2_weights(model, torch.bfloat16).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].bfloat16())
    theirs = converted(model, tmp_path, torch.bfloat16)
    assert theirs.dtype == torch.bfloat16
    tokens = real_text(64)
    torch.testing.assert_close(theirs(tokens).logits.float(), model(tokens), rtol=0.05, atol=0.1)


def test_head_is_stored_once_and_no_memory_is_shared_with_the_model() -> None:
    model = away_from_zero(SHAPES[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = gpt2_weights(model, torch.float32)
    assert weights.keys() == before.keys()
    assert sum(value.numel() for value in weights.values()) == model.num_parameters()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
