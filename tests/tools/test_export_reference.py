"""The published forward passes against transformers, and models that differ from them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from app.errors import UserError
from app.model.architectures import build_model, to_huggingface
from app.model.gpt import ACTIVATIONS, GPT, GPTConfig
from app.model.language_model import LanguageModel, ModelConfig
from app.model.qwen3 import Qwen3Config
from app.tools.export.reference import check_matches_transformers, transformers_logits

GPT2 = GPTConfig(context_length=64, vocab_size=300, num_layers=3, embd_size=48, num_heads=4)
QWEN3 = Qwen3Config(64, vocab_size=300, num_layers=3, embd_size=48, num_heads=2, head_dim=32)


def check(model: LanguageModel) -> None:
    check_matches_transformers(model, lambda: None)


def a_model(config: ModelConfig) -> LanguageModel:
    """A model as training begins with it by default: its output projections are zero."""
    torch.manual_seed(0)
    return build_model(config, zero_init=True).eval()


@pytest.mark.parametrize(
    "config",
    (
        GPT2,
        GPTConfig(context_length=200, vocab_size=300, num_layers=1, embd_size=32, num_heads=1),
        GPTConfig(64, vocab_size=300, embd_size=24, num_heads=3, activation="gelu_new"),
        QWEN3,
        Qwen3Config(200, vocab_size=300, num_layers=1, embd_size=32, num_heads=3, head_dim=6),
        Qwen3Config(64, vocab_size=300, embd_size=64, num_heads=2, tie_embeddings=True),
    ),
    ids=str,
)
@torch.no_grad()
def test_transformers_logits_are_those_of_its_own_class(config: ModelConfig) -> None:
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    content, weights = to_huggingface(model, torch.float32, 0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content)).eval()
    lacking, surplus = theirs.load_state_dict(weights, strict=False)
    assert not surplus
    assert set(lacking) <= {"lm_head.weight"}
    theirs.tie_weights()
    tokens = torch.randint(config.vocab_size, (2, config.context_length), generator=generator)
    expected = theirs(tokens).logits
    difference = (transformers_logits(content, weights, tokens) - expected).abs().max()
    assert difference < 2e-5 * expected.std()


class Turned(nn.Module):
    """GPT-2's attention with rotary positions."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.output_scale = attn.c_attn, attn.c_proj, attn.output_scale

    def forward(self, x: Tensor, cache: None = None) -> Tensor:
        q, k, v = (it.unflatten(-1, (4, -1)).transpose(1, 2) for it in self.c_attn(x).chunk(3, -1))
        angles = torch.outer(torch.arange(x.shape[1]), 10_000 ** -torch.linspace(0, 1, 6))
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(it.unflatten(-1, (6, 2)).contiguous()) * turn
            ).flatten(-2)
            for it in (q, k)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output_scale * self.c_proj(y.transpose(1, 2).flatten(2))


class Capped(GPT):
    """A GPT with capped logits, as Gemma's."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        return 15 * torch.tanh(super().forward(idx, targets) / 15)


class Clipped(GPT):
    """A GPT whose logits are clipped, far from those of random weights."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(idx, targets).clamp(-50, 50)


def squared(model: Any) -> None:
    model.transformer.h[1].mlp.activation = lambda x: F.relu(x).square()


def other_gelu(model: Any) -> None:
    for block in model.transformer.h:
        block.mlp.activation = ACTIVATIONS["gelu_new"]


def other_eps(model: Any) -> None:
    model.transformer.h[2].ln_2.eps = 1e-3


def turned(model: Any) -> None:
    for block in model.transformer.h:
        block.attn = Turned(block.attn)


def unscaled(model: Any) -> None:
    model.transformer.h[2].attn.output_scale = 1.0


def wider(model: Any) -> None:
    mlp = model.transformer.h[0].mlp
    mlp.c_fc, mlp.c_proj = nn.Linear(48, 96), nn.Linear(96, 48)


def without_bias(model: Any) -> None:
    model.transformer.h[0].mlp.c_proj.bias = None


def gated(model: Any) -> None:
    model.transformer.h[0].mlp.gate = nn.Linear(48, 1)


def without_scale(model: Any) -> None:
    del model.transformer.h[0].attn.output_scale


def capped(model: Any) -> None:
    model.__class__ = Capped


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (
            squared,
            r"with random weights its logits differ by up to [\d.]+, with a standard deviation of ",
        ),
        (other_gelu, "with random weights"),
        (other_eps, "with random weights"),
        (turned, "with random weights"),
        (unscaled, "with random weights"),
        (capped, "its logits differ by up to"),
        (wider, r"transformer\.h\.0\.mlp\.c_fc\.weight is \[48, 96\], not \[48, 192\]"),
        (without_bias, r"transformer\.h\.0\.mlp\.c_proj\.bias is missing"),
        (gated, r"it has transformer\.h\.0\.mlp\.gate\.bias, .*gate\.weight as well"),
        (without_scale, "'CausalSelfAttention' object has no attribute 'output_scale'"),
    ),
    ids=lambda it: getattr(it, "__name__", ""),
)
def test_a_changed_gpt2_is_refused_with_the_reason(change: Any, reason: str) -> None:
    check(a_model(GPT2))
    model = a_model(GPT2)
    change(model)
    with pytest.raises(UserError, match=rf"app/model computes is not a \w.*: .*{reason}"):
        check(model)


def test_a_change_that_only_trained_weights_show_is_refused() -> None:
    model: Any = a_model(GPT2)
    model.__class__ = Clipped

    def load_trained_weights() -> None:
        model.transformer.ln_f.weight.fill_(50)

    with pytest.raises(UserError, match="with its own weights its logits differ by up to"):
        check_matches_transformers(model, load_trained_weights)


def test_a_changed_qwen3_is_refused() -> None:
    def other_eps(model: Any) -> None:
        for block in model.model.layers:
            block.self_attn.q_norm.eps = 1e-3

    def other_rotary(model: Any) -> None:
        rotary = model.model.layers[0].self_attn.rotary
        rotary.cos, rotary.sin = rotary.sin, rotary.cos

    def normed_values(model: Any) -> None:
        model.model.layers[1].self_attn.v_norm = nn.RMSNorm(32)

    for change in (other_eps, other_rotary, normed_values):
        check(a_model(QWEN3))
        model = a_model(QWEN3)
        change(model)
        with pytest.raises(UserError, match="is not a Qwen3ForCausalLM: "):
            check(model)


def test_an_architecture_of_ones_own_is_refused() -> None:
    class Mine(LanguageModel):
        blocks = head_weight = None  # type: ignore[assignment]
        embed = final_norm = None  # type: ignore[assignment]

    with pytest.raises(UserError, match="not a model of transformers: it has no class for Mine"):
        check(Mine(GPT2, bf16_residual=False))
