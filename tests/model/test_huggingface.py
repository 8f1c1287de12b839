"""Converted models in the real transformers."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedModel, Qwen3ForCausalLM

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.model.architectures import build_model, to_huggingface
from app.model.gpt import GPT, GPTConfig
from app.model.huggingface import qwen3_weights
from app.model.kv_cache import KeyValueCache
from app.model.language_model import LanguageModel, ModelConfig
from app.model.qwen3 import Qwen3, Qwen3Config
from tests.model.generation import generate

GPT2_SHAPES = (
    GPTConfig(context_length=64, num_layers=1, embd_size=8, num_heads=1),
    GPTConfig(context_length=100, num_layers=3, embd_size=48, num_heads=6),
    GPTConfig(context_length=128, num_layers=7, embd_size=96, num_heads=3),
)
QWEN3_SHAPES = (
    Qwen3Config(64, num_layers=1, embd_size=16, num_heads=1, head_dim=2, tie_embeddings=True),
    Qwen3Config(100, num_layers=3, embd_size=48, num_heads=6, head_dim=64, tie_embeddings=True),
    Qwen3Config(128, num_layers=7, embd_size=96, num_heads=3, head_dim=64),
    Qwen3Config(128, num_layers=3, embd_size=256, num_heads=2, head_dim=128, tie_embeddings=True),
    Qwen3Config(96, num_layers=2, embd_size=72, num_heads=2, head_dim=128),
)
SHAPES = (*GPT2_SHAPES, *QWEN3_SHAPES)
CLASSES = {GPTConfig: GPT2LMHeadModel, Qwen3Config: Qwen3ForCausalLM}
GPT2_124M = GPTConfig()


def real_text(count: int) -> Tensor:
    """Tokens of this program's own source, int64 [1, count]."""
    source = Path(__file__).parents[2] / "app"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.py")))
    return torch.from_numpy(Tokenizer().encode(text)[:count].astype(np.int64))[None]


def converted(
    model: LanguageModel, folder: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    config, weights = to_huggingface(model, dtype, END_OF_TEXT)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kind = CLASSES[type(model.config)]
    assert config["architectures"] == [kind.__name__]
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded


def away_from_zero(config: ModelConfig) -> LanguageModel:
    """A model whose biases and norms are not those of the start, where a lost one is not seen."""
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_logits_are_the_same(shape: ModelConfig, tmp_path: Path) -> None:
    model = away_from_zero(shape)
    tokens = real_text(shape.context_length)
    actual, expected = converted(model, tmp_path)(tokens).logits, model(tokens)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.slow
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


def greedy(model: PreTrainedModel, prompt: Tensor, max_tokens: int) -> list[list[int]]:
    """Return what transformers generates, whether or not documents end."""
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_text_is_the_same_to_the_end_of_the_context(
    shape: ModelConfig, tmp_path: Path
) -> None:
    model = away_from_zero(shape)
    prompt = real_text(8)
    count = shape.context_length - 8
    expected = generate(model, prompt, count, temperature=0).tolist()
    assert greedy(converted(model, tmp_path), prompt, count) == expected


@pytest.mark.parametrize("shape", (GPT2_SHAPES[1], QWEN3_SHAPES[1]), ids=str)
@torch.no_grad()
def test_bfloat16_rounds_the_weights_once(shape: ModelConfig, tmp_path: Path) -> None:
    model = away_from_zero(shape)
    _, exact = to_huggingface(model, torch.float32, END_OF_TEXT)
    for name, value in to_huggingface(model, torch.bfloat16, END_OF_TEXT)[1].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].bfloat16())
    theirs = converted(model, tmp_path, torch.bfloat16)
    assert theirs.dtype == torch.bfloat16
    tokens = real_text(64)
    torch.testing.assert_close(theirs(tokens).logits.float(), model(tokens), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("shape", (GPT2_SHAPES[1], *QWEN3_SHAPES[1:3]), ids=str)
def test_every_value_is_stored_once_and_the_model_stays_as_it_is(shape: ModelConfig) -> None:
    model = away_from_zero(shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, weights = to_huggingface(model, torch.float32, END_OF_TEXT)
    assert sum(value.numel() for value in weights.values()) == model.num_parameters()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("shape", QWEN3_SHAPES, ids=str)
@torch.no_grad()
def test_logits_with_a_cache_are_the_same(shape: Qwen3Config, tmp_path: Path) -> None:
    model, tokens = away_from_zero(shape), real_text(shape.context_length)
    theirs, cache, past = converted(model, tmp_path), KeyValueCache(shape.num_layers, 64), None
    for end in (40, 41, 42, 43):
        new = tokens[:, cache.length : end]
        answer = theirs(new, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        assert (answer.logits[:, -1] - model.next_logits(new, cache)).abs().max() < 1e-4


def by_their_names(model: Qwen3, theirs: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter of theirs with its gradient, beside the part of ours that stores it."""
    gradients = Qwen3(model.config)
    for parameter, own in zip(gradients.parameters(), model.parameters(), strict=True):
        assert own.grad is not None
        parameter.data = own.grad
    ours = qwen3_weights(gradients, torch.float32)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        yield ours.pop(name), parameter.grad
    assert not ours


@pytest.mark.parametrize("shape", (QWEN3_SHAPES[2], QWEN3_SHAPES[3]), ids=str)
def test_five_steps_of_training_have_the_same_losses_and_gradients(
    shape: Qwen3Config, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Qwen3(shape)
    theirs = converted(model, tmp_path).train()
    optimizers = [torch.optim.AdamW(it.parameters(), lr=1e-3) for it in (model, theirs)]
    text = real_text(5 * 2 * 64 + 1)[0]
    losses = []
    for step in range(5):
        part = text[step * 128 : (step + 1) * 128 + 1]
        inputs, targets = part[:-1].view(2, 64), part[1:].view(2, 64)
        loss = model(inputs, targets)
        expected = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
        for value, optimizer in zip((loss, expected), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for ours, other in by_their_names(model, theirs):
            assert (ours - other).norm() <= 1e-4 * other.norm()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
