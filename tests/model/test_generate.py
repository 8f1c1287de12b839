import pytest
import torch

from app.model.generate import generate
from app.model.gpt import GPT, GPTConfig

CONFIG = GPTConfig(context_length=12, vocab_size=61, num_layers=2, embd_size=16, num_heads=2)
PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    for parameter in gpt.parameters():
        parameter.data *= 20  # far from uniform, so that temperature and top-k matter
    return gpt


def test_greedy_takes_the_likeliest_token_past_the_context(model: GPT) -> None:
    written = generate(model, PROMPT, 20, temperature=0)
    assert torch.equal(written[:, :3], PROMPT)
    for length in range(3, 23):
        window = written[:, max(0, length - CONFIG.context_length) : length]
        assert torch.equal(written[:, length], model(window)[:, -1].argmax(-1))


def test_same_seed_writes_the_same_and_another_seed_something_else(model: GPT) -> None:
    first = generate(model, PROMPT, 30, seed=1, temperature=2.0)
    assert torch.equal(first, generate(model, PROMPT, 30, seed=1, temperature=2.0))
    assert not torch.equal(first, generate(model, PROMPT, 30, seed=2, temperature=2.0))


def test_top_k_draws_only_from_the_k_likeliest(model: GPT) -> None:
    prompt = torch.tensor([[7]])
    likely = set(model(prompt)[0, -1].topk(3).indices.tolist())
    drawn = {
        int(generate(model, prompt, 1, top_k=3, temperature=50.0, seed=seed)[0, -1])
        for seed in range(200)
    }
    assert drawn == likely


def test_draws_follow_the_models_distribution(model: GPT) -> None:
    rows = 20_000
    prompt = torch.tensor([[7]])
    expected = (model(prompt)[0, -1] / 1.5).softmax(-1)
    drawn = generate(model, prompt.expand(rows, 1), 1, temperature=1.5)[:, -1]
    found = drawn.bincount(minlength=CONFIG.vocab_size) / rows
    assert (found - expected).abs().max() < 4 * (0.25 / rows) ** 0.5
