"""The model against its own mathematics, written out again in float64."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.model.gpt import GPT, GPTConfig

CONFIG = GPTConfig(context_length=16, vocab_size=97, num_layers=3, embd_size=24, num_heads=4)


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    for parameter in gpt.parameters():
        # Biases and norms start at 0 and 1, where a forgotten one would not be seen.
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return gpt


def reference_logits(weights: dict[str, Tensor], idx: Tensor) -> Tensor:
    """GPT-2 written out: explicit softmax attention, exact GELU, attention scaled by depth."""
    w = {name.removeprefix("transformer."): value.double() for name, value in weights.items()}
    rows, length = idx.shape
    width, heads = CONFIG.embd_size, CONFIG.num_heads
    x = w["wte.weight"][idx] + w["wpe.weight"][:length]
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        variance = (centered**2).mean(-1, keepdim=True)
        return centered / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for layer in range(CONFIG.num_layers):
        block = f"h.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = (
            qkv[..., i * width : (i + 1) * width]
            .reshape(rows, length, heads, width // heads)
            .transpose(1, 2)
            for i in range(3)
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).masked_fill(
            future, -math.inf
        )
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)
        x = x + linear(mixed, f"{block}.attn.c_proj") / math.sqrt(2 * CONFIG.num_layers)
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(gelu, f"{block}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def test_logits_are_the_written_out_mathematics(model: GPT) -> None:
    idx = tokens(2, CONFIG.context_length)
    expected = reference_logits(model.state_dict(), idx)
    torch.testing.assert_close(model(idx).double(), expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_are_the_written_out_mathematics(model: GPT) -> None:
    idx, targets = tokens(2, 9), tokens(2, 9, seed=2)
    weights = {name: value.double().requires_grad_() for name, value in model.state_dict().items()}
    logits = reference_logits(weights, idx)
    log_probabilities = logits.log_softmax(-1).gather(-1, targets[..., None])
    (-log_probabilities.mean()).backward()
    loss = model(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss.double(), -log_probabilities.mean(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), weights[name].grad, rtol=1e-3, atol=1e-6, msg=name
        )


def test_fifty_steps_are_those_of_the_written_out_mathematics(model: GPT) -> None:
    weights = {name: value.double().requires_grad_() for name, value in model.state_dict().items()}
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    written_out = torch.optim.AdamW(weights.values(), lr=1e-3)
    actual: list[float] = []
    expected: list[float] = []
    for step in range(50):
        idx, targets = tokens(2, 9, seed=step % 5), tokens(2, 9, seed=100 + step % 5)
        logits = reference_logits(weights, idx)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        for optimizer, value in ((written_out, loss), (own, model(idx, targets))):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            (expected if optimizer is written_out else actual).append(value.item())
    assert expected[-1] < expected[0] - 0.5
    assert actual == pytest.approx(expected, abs=1e-4)


def test_residual_stream_is_bf16_only_under_autocast_and_if_configured() -> None:
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    losses = []
    for bf16_residual in (False, True):
        torch.manual_seed(0)
        gpt = GPT(CONFIG, bf16_residual=bf16_residual)
        assert gpt.embed(idx).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = gpt.embed(idx)
            assert x.dtype == (torch.bfloat16 if bf16_residual else torch.float32)
            assert gpt.transformer.h[0](x).dtype == x.dtype
            losses.append(gpt(idx, targets))
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)


def test_state_dict_has_gpt2s_names_and_one_tied_embedding(model: GPT) -> None:
    names = model.state_dict().keys()
    assert "lm_head.weight" not in names
    assert {name for name in names if ".h." not in name} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }
    assert {name.removeprefix("transformer.h.0.") for name in names if ".h.0." in name} == {
        f"{layer}.{kind}"
        for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }


def test_tokens_do_not_see_the_future(model: GPT) -> None:
    idx = tokens(1, CONFIG.context_length)
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % CONFIG.vocab_size
    before, after = model(idx), model(changed)
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 10], after[0, 10])


def test_gpt2_has_124_million_parameters_and_the_known_flops() -> None:
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig())
    assert gpt2.num_parameters() == 124_439_808
    assert gpt2.flops_per_token() == pytest.approx(797.9e6, rel=1e-3)


def test_modules_that_are_added_count() -> None:
    before, model = GPT(CONFIG), GPT(CONFIG)
    for block in model.transformer.h:
        block.gate = nn.Linear(24, 5)
        block.mix = nn.Conv1d(24, 24, kernel_size=3, groups=24)
    # Looked up, not multiplied.
    model.transformer.value_embedding = nn.Embedding(97, 24)
    multiplied = 3 * (24 * 5 + 24 * 3)
    assert model.num_multiplied() - before.num_multiplied() == multiplied
    assert model.flops_per_token() - before.flops_per_token() == 6 * multiplied
    added = model.num_parameters() - before.num_parameters()
    assert added == multiplied + 3 * (5 + 24) + 97 * 24


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, 1000, 2, 64, 4))
    for name, parameter in gpt.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_initial_loss_is_that_of_a_uniform_distribution() -> None:
    torch.manual_seed(0)
    loss = GPT(CONFIG)(tokens(8, 16), tokens(8, 16, seed=2))
    assert loss.item() == pytest.approx(math.log(CONFIG.vocab_size), abs=0.1)


def test_bf16_autocast_returns_a_float32_loss_close_to_float32(model: GPT) -> None:
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(idx, targets), rtol=2e-2, atol=0)


def test_default_loss_is_torchs_cross_entropy(model: GPT) -> None:
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    logits = model(idx)
    assert logits.shape == (2, 16, CONFIG.vocab_size)
    assert torch.equal(
        model(idx, targets), F.cross_entropy(logits.view(-1, CONFIG.vocab_size), targets.view(-1))
    )


def test_zero_init_makes_blocks_pass_on_their_input() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 2, 8, 2), zero_init=True)
    x = torch.randn(2, 8, 8)
    assert torch.equal(model.transformer.h[1](x), x)
    torch.manual_seed(0)
    other = GPT(GPTConfig(8, 50, 2, 8, 2)).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other[name]) or name.endswith("c_proj.weight"), name
