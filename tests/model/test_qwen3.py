"""Qwen3 against its mathematics, written out again in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from app.model.gpt import GPT, GPTConfig
from app.model.kv_cache import KeyValueCache
from app.model.qwen3 import Qwen3, Qwen3Config

CONFIG = Qwen3Config(
    context_length=16, vocab_size=97, num_layers=3, embd_size=24, num_heads=3, head_dim=10
)
TIED = Qwen3Config(16, 97, 2, 40, 2, 4, tie_embeddings=True)


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=generator)


def away_from_start(config: Qwen3Config) -> Qwen3:
    """A model whose gains are not 1, where a forgotten one would not be seen."""
    torch.manual_seed(0)
    model = Qwen3(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def reference_logits(config: Qwen3Config, weights: dict[str, Tensor], idx: Tensor) -> Tensor:
    """Qwen3 written out: explicit softmax attention, and positions as complex numbers."""
    w = {name.removeprefix("model."): value.double() for name, value in weights.items()}
    rows, length = idx.shape
    heads, size = config.num_heads, config.head_dim
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    x = w["embed_tokens.weight"][idx]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        half = size // 2
        turned = torch.empty_like(x)
        for position in range(length):
            for i in range(half):
                angle = position / 10000 ** (2 * i / size)
                z = torch.complex(x[:, :, position, i], x[:, :, position, i + half])
                z = z * complex(math.cos(angle), math.sin(angle))
                turned[:, :, position, i] = z.real
                turned[:, :, position, i + half] = z.imag
        return turned

    for layer in range(config.num_layers):
        block = f"layers.{layer}"
        attention = f"{block}.self_attn"
        stream = norm(x, f"{block}.input_layernorm")
        q, k, v = (
            (stream @ matrix.T).reshape(rows, length, heads, size).transpose(1, 2)
            for matrix in w[f"{attention}.qkv_proj.weight"].split(heads * size)
        )
        q, k = turn(norm(q, f"{attention}.q_norm")), turn(norm(k, f"{attention}.k_norm"))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, heads * size)
        x = x + mixed @ w[f"{attention}.o_proj.weight"].T
        stream = norm(x, f"{block}.post_attention_layernorm")
        gate_matrix, up_matrix = w[f"{block}.mlp.gate_up_proj.weight"].split(config.mlp_size)
        gate = stream @ gate_matrix.T
        hidden = gate * torch.sigmoid(gate) * (stream @ up_matrix.T)
        x = x + hidden @ w[f"{block}.mlp.down_proj.weight"].T
    head = w["embed_tokens.weight"] if config.tie_embeddings else w["lm_head.weight"]
    return norm(x, "norm") @ head.T


@pytest.mark.parametrize("config", (CONFIG, TIED))
def test_logits_loss_and_gradients_are_the_written_out_mathematics(config: Qwen3Config) -> None:
    model = away_from_start(config)
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    weights = {name: value.double().requires_grad_() for name, value in model.state_dict().items()}
    logits = reference_logits(config, weights, idx)
    torch.testing.assert_close(model(idx).double(), logits, rtol=1e-4, atol=1e-5)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    loss = model(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), weights[name].grad, rtol=1e-3, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("config", (CONFIG, TIED))
@pytest.mark.parametrize("length", (1, 7, 16))
@torch.no_grad()
def test_cached_logits_are_those_of_one_forward_pass(config: Qwen3Config, length: int) -> None:
    model, idx = away_from_start(config), tokens(3, 16)
    expected = model(idx)
    cache = KeyValueCache(config.num_layers, 16)
    for end in range(length, 17):
        logits = model.next_logits(idx[:, cache.length : end], cache)
        torch.testing.assert_close(logits, expected[:, end - 1], rtol=1e-4, atol=1e-5)


def test_names_are_transformers_but_for_the_stacked_matrices() -> None:
    names = away_from_start(CONFIG).state_dict().keys()
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    start = "model.layers.0."
    assert {name.removeprefix(start) for name in names if name.startswith(start)} == {
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    }
    assert "lm_head.weight" not in away_from_start(TIED).state_dict()


@pytest.mark.parametrize(("tied", "stored"), ((False, 162_151_680), (True, 123_554_304)))
def test_the_default_shape_multiplies_as_many_weights_as_gpt2(tied: bool, stored: int) -> None:
    with torch.device("meta"):
        model, gpt2 = Qwen3(Qwen3Config(tie_embeddings=tied)), GPT(GPTConfig())
    assert model.num_parameters() == stored
    assert model.num_multiplied() == gpt2.num_multiplied() == 123_532_032
    assert model.flops_per_token() == gpt2.flops_per_token()


@pytest.mark.parametrize(("width", "size"), ((256, 704), (384, 1024), (768, 2048), (24, 64)))
def test_mlp_is_eight_thirds_of_the_width_in_multiples_of_64(width: int, size: int) -> None:
    assert Qwen3Config(embd_size=width).mlp_size == size


@pytest.mark.parametrize("config", (CONFIG, TIED))
def test_initial_weights_and_loss(config: Qwen3Config) -> None:
    torch.manual_seed(0)
    model = Qwen3(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert model(tokens(8, 16), tokens(8, 16, 2)).item() == pytest.approx(math.log(97), abs=0.1)


@pytest.mark.parametrize("config", (CONFIG, TIED))
def test_zero_init_lets_every_other_weight_as_it_is(config: Qwen3Config) -> None:
    models = []
    for zero_init in (False, True):
        torch.manual_seed(0)
        models.append(Qwen3(config, zero_init=zero_init))
    usual, zero = (model.state_dict() for model in models)
    for name, value in zero.items():
        is_zero = name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight"))
        assert torch.equal(value, torch.zeros_like(value) if is_zero else usual[name]), name
    idx = tokens(2, 16)
    model = models[1]
    assert torch.equal(model.blocks[0](model.embed(idx)), model.embed(idx))


def test_residual_stream_is_bf16_only_under_autocast_and_if_configured() -> None:
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    for bf16_residual in (False, True):
        torch.manual_seed(0)
        model = Qwen3(CONFIG, bf16_residual=bf16_residual)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = model.embed(idx)
            assert x.dtype == (torch.bfloat16 if bf16_residual else torch.float32)
            assert model.blocks[0](x).dtype == x.dtype
            loss = model(idx, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, model(idx, targets), rtol=2e-2, atol=0)


def test_positions_are_no_part_of_a_checkpoint_and_an_odd_head_is_refused() -> None:
    model = Qwen3(CONFIG)
    assert len(dict(model.named_buffers())) == 2
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    with pytest.raises(ValueError, match="rotary positions turn pairs of values, and 5 is odd"):
        Qwen3Config(head_dim=5)
