from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.model.generate import generate_tokens
from app.model.gpt import GPT, GPTConfig
from app.model.kv_cache import KeyValueCache
from tests.model.generation import generate, generate_without_cache

CONFIG = GPTConfig(context_length=12, vocab_size=61, num_layers=2, embd_size=16, num_heads=2)
PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


def far_from_uniform(config: GPTConfig = CONFIG) -> GPT:
    """A model for which temperature and top-k matter."""
    torch.manual_seed(0)
    gpt = GPT(config)
    for parameter in gpt.parameters():
        parameter.data *= 20
    return gpt


@pytest.fixture
def model() -> GPT:
    return far_from_uniform()


@pytest.mark.parametrize("length", range(1, CONFIG.context_length + 1))
@pytest.mark.parametrize("rows", (1, 3))
@torch.no_grad()
def test_cached_logits_are_those_of_one_forward_pass(length: int, rows: int) -> None:
    torch.manual_seed(rows)
    model = GPT(CONFIG)
    for parameter in model.parameters():
        # Biases and norms start at 0 and 1, where a forgotten one would not be seen.
        parameter.data += 0.1 * torch.randn(parameter.shape)
    idx = torch.randint(0, CONFIG.vocab_size, (rows, CONFIG.context_length))
    expected = model(idx)
    cache = KeyValueCache(CONFIG.num_layers, CONFIG.context_length)
    for first, end in ((0, length), *((i, i + 1) for i in range(length, CONFIG.context_length))):
        actual = model.next_logits(idx[:, first:end], cache)
        torch.testing.assert_close(actual, expected[:, end - 1], rtol=0, atol=1e-5)
        assert cache.length == end


@torch.no_grad()
def test_cleared_cache_is_empty(model: GPT) -> None:
    cache = KeyValueCache(CONFIG.num_layers, CONFIG.context_length)
    model.next_logits(torch.tensor([[1, 2, 3, 4]]), cache)
    cache.clear()
    actual = model.next_logits(torch.tensor([[5, 6]]), cache)
    torch.testing.assert_close(actual, model(torch.tensor([[5, 6]]))[:, -1])


@settings(max_examples=60)
@given(
    shape=st.sampled_from((CONFIG, GPTConfig(5, 61, 1, 8, 1), GPTConfig(33, 61, 3, 24, 4))),
    prompt=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    rows=st.integers(1, 3),
    max_tokens=st.integers(0, 40),
    drawn=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from((0.0, 0.5, 1.0, 3.0)),
            "top_k": st.sampled_from((0, 1, 5, 60, 61, 100)),
            "seed": st.integers(0, 2**32 - 1),
        }
    ),
)
def test_tokens_are_those_generated_without_a_cache(
    shape: GPTConfig, prompt: list[int], rows: int, max_tokens: int, drawn: dict[str, Any]
) -> None:
    model = far_from_uniform(shape)
    prompts = torch.tensor([prompt] * rows)
    actual = generate(model, prompts, max_tokens, **drawn)
    assert torch.equal(actual, generate_without_cache(model, prompts, max_tokens, **drawn))


def test_rows_with_different_prompts_do_not_mix(model: GPT) -> None:
    together = generate(model, PROMPT, 20, temperature=0)
    for row, prompt in zip(together, PROMPT, strict=True):
        assert torch.equal(row[None], generate(model, prompt[None], 20, temperature=0))


def test_greedy_takes_the_likeliest_token_past_the_context(model: GPT) -> None:
    written = generate(model, PROMPT, 20, temperature=0)
    assert torch.equal(written[:, :3], PROMPT)
    for length in range(3, 23):
        window = written[:, max(0, length - CONFIG.context_length) : length]
        assert torch.equal(written[:, length], model(window)[:, -1].argmax(-1))


def test_tokens_are_computed_only_when_requested(model: GPT) -> None:
    forwards = []
    model.transformer.ln_f.register_forward_hook(lambda *_: forwards.append(1))
    stream = generate_tokens(model, PROMPT, 10**9, seed=1)
    first = [next(stream)[0] for _ in range(4)]
    stream.close()
    assert len(forwards) == 4
    assert [tokens.shape for tokens in first] == [(2,)] * 4
    assert {tokens.dtype for tokens in first} == {torch.int64}
    assert torch.equal(torch.stack(first, dim=1), generate(model, PROMPT, 4, seed=1)[:, 3:])


def test_only_the_new_token_is_computed_while_all_fit_the_context(model: GPT) -> None:
    computed = []
    model.transformer.h[0].register_forward_pre_hook(
        lambda _, given: computed.append(given[0].shape[1])
    )
    generate(model, PROMPT, 12)
    assert computed == [3, *[1] * 9, 12, 12]


def test_gradients_stay_enabled_between_tokens(model: GPT) -> None:
    stream = generate_tokens(model, PROMPT, 5)
    assert not next(stream)[0].requires_grad
    assert torch.is_grad_enabled()
    assert model(PROMPT).requires_grad


def test_text_depends_on_the_seed(model: GPT) -> None:
    first = generate(model, PROMPT, 30, seed=1, temperature=2.0)
    assert torch.equal(first, generate(model, PROMPT, 30, seed=1, temperature=2.0))
    assert not torch.equal(first, generate(model, PROMPT, 30, seed=2, temperature=2.0))


def test_top_k_samples_only_the_k_likeliest(model: GPT) -> None:
    prompt = torch.tensor([[7]])
    likely = set(model(prompt)[0, -1].topk(3).indices.tolist())
    drawn = {
        int(generate(model, prompt, 1, top_k=3, temperature=50.0, seed=seed)[0, -1])
        for seed in range(200)
    }
    assert drawn == likely


def test_samples_follow_the_models_distribution(model: GPT) -> None:
    rows = 20_000
    prompt = torch.tensor([[7]])
    expected = (model(prompt)[0, -1] / 1.5).softmax(-1)
    drawn = generate(model, prompt.expand(rows, 1), 1, temperature=1.5)[:, -1]
    actual = drawn.bincount(minlength=CONFIG.vocab_size) / rows
    assert (actual - expected).abs().max() < 4 * (0.25 / rows) ** 0.5


@pytest.mark.parametrize("temperature", (5e-324, 1e-300, 1e-40, 1e-38, 1e-10))
def test_a_tiny_temperature_takes_the_likeliest_token(model: GPT, temperature: float) -> None:
    likeliest = generate(model, PROMPT, 20, temperature=0)
    assert torch.equal(generate(model, PROMPT, 20, temperature=temperature), likeliest)


@pytest.mark.parametrize("top_k", (CONFIG.vocab_size, CONFIG.vocab_size + 1, 10**30))
def test_top_k_of_the_vocabulary_or_more_samples_from_all(model: GPT, top_k: int) -> None:
    from_all = generate(model, PROMPT, 20, temperature=3.0, top_k=0)
    assert torch.equal(generate(model, PROMPT, 20, temperature=3.0, top_k=top_k), from_all)
