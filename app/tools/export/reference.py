"""GPT-2 and Qwen3 as transformers' classes compute them, and the check that a model is one.

Both are computed from an export's config.json and weights alone, without app.model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.model.architectures import to_huggingface

if TYPE_CHECKING:
    from app.model.language_model import LanguageModel

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
_MOST_TOKENS = 1024
# Shares of the logits' standard deviation. Trained models have large activations to round.
_ROUNDING, _ROUNDING_IF_TRAINED = 1e-4, 1e-2


@torch.no_grad()
def check_matches_transformers(model: LanguageModel, load_weights: Callable[[], object]) -> None:
    """Compare a model's float32 logits of random tokens with those of transformers' class.

    Its own weights are not enough: output projections that are still near zero hide what comes
    before them. So random weights are tried as well, and first: a large model does not fit into
    memory twice.

    Args:
        model: a new one.
        load_weights: gives it its own weights.

    Raises:
        UserError: they differ, or the weights are not those that the class has.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(model.config.context_length, _MOST_TOKENS)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.2 * noise)
    _compare(model, tokens, "random weights", _ROUNDING)
    load_weights()
    _compare(model, tokens, "its own weights", _ROUNDING_IF_TRAINED)


def _compare(model: LanguageModel, tokens: Tensor, weights_used: str, rounding: float) -> None:
    name = "model of transformers"
    try:
        config, weights = to_huggingface(model, torch.float32, END_OF_TEXT)
        name = config["architectures"][0]
        theirs = transformers_logits(config, weights, tokens)
        difference, spread = float((model(tokens) - theirs).abs().max()), float(theirs.std())
        if not difference <= rounding * spread:
            away = f"{difference:.2g}, with a standard deviation of {spread:.2g}"
            raise ValueError(f"with {weights_used} its logits differ by up to {away}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"the model that app/model computes is not a {name}: {error}",
            "undo the change of app/model if the run was trained without it; otherwise use sample, "
            "evaluate and playground: transformers would compute something else",
        ) from None


def transformers_logits(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor
) -> Tensor:
    """Return the logits [B, T, vocab] of the class that config.json names.

    Args:
        config: content of config.json.
        weights: its float32 weights, by transformers' names.
        tokens: int [B, T].

    Raises:
        ValueError: a weight is missing, is one too many or has another shape; or the config names
            an activation that is not known here.
    """
    left = dict(weights)

    def take(name: str, *shape: int) -> Tensor:
        value = left.pop(name, None)
        if value is None or value.shape != shape:
            found = "missing" if value is None else f"{list(value.shape)}, not {list(shape)}"
            raise ValueError(f"{name} is {found}")
        return value

    classes = {"GPT2LMHeadModel": _gpt2, "Qwen3ForCausalLM": _qwen3}
    logits = classes[config["architectures"][0]](config, take, tokens)
    if left:
        raise ValueError(f"it has {', '.join(sorted(left)[:3])} as well")
    return logits


def _gpt2(config: Mapping[str, Any], take: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    width, heads = config["n_embd"], config["n_head"]
    activation = _activation(config["activation_function"])

    def norm(x: Tensor, name: str) -> Tensor:
        gain, bias = take(f"{name}.weight", width), take(f"{name}.bias", width)
        return F.layer_norm(x, (width,), gain, bias, config["layer_norm_epsilon"])

    def linear(x: Tensor, name: str, size: int) -> Tensor:
        return x @ take(f"{name}.weight", x.shape[-1], size) + take(f"{name}.bias", size)

    embedding = take("transformer.wte.weight", config["vocab_size"], width)
    positions = take("transformer.wpe.weight", config["n_positions"], width)
    x = embedding[tokens] + positions[: tokens.shape[1]]
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn", 3 * width)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, dim=-1))
        x = x + linear(_attention(q, k, v), f"{block}.attn.c_proj", width)
        inner = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc", 4 * width)
        x = x + linear(activation(inner), f"{block}.mlp.c_proj", width)
    return norm(x, "transformer.ln_f") @ embedding.T


def _qwen3(config: Mapping[str, Any], take: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    width, head_dim, inner = (
        config[key] for key in ("hidden_size", "head_dim", "intermediate_size")
    )
    activation = _activation(config["hidden_act"])
    frequencies = config["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(tokens.shape[1]), frequencies)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        gain = take(f"{name}.weight", x.shape[-1])
        return x * torch.rsqrt(mean_square + config["rms_norm_eps"]) * gain

    def linear(x: Tensor, name: str, size: int) -> Tensor:
        return x @ take(f"{name}.weight", size, x.shape[-1]).T

    def heads(x: Tensor, name: str, count: int) -> Tensor:
        return linear(x, name, count * head_dim).unflatten(-1, (count, head_dim))

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat(
            (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1
        )

    embedding = head = take("model.embed_tokens.weight", config["vocab_size"], width)
    x = embedding[tokens]
    for layer in range(config["num_hidden_layers"]):
        attn, mlp = (f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp"))
        y = norm(x, f"model.layers.{layer}.input_layernorm")
        q = heads(y, f"{attn}.q_proj", config["num_attention_heads"])
        k, v = (heads(y, f"{attn}.{it}_proj", config["num_key_value_heads"]) for it in "kv")
        q, k = rotated(norm(q, f"{attn}.q_norm")), rotated(norm(k, f"{attn}.k_norm"))
        x = x + linear(_attention(q, k, v), f"{attn}.o_proj", width)
        y = norm(x, f"model.layers.{layer}.post_attention_layernorm")
        y = activation(linear(y, f"{mlp}.gate_proj", inner)) * linear(y, f"{mlp}.up_proj", inner)
        x = x + linear(y, f"{mlp}.down_proj", width)
    x = norm(x, "model.norm")
    if not config["tie_word_embeddings"]:
        head = take("lm_head.weight", config["vocab_size"], width)
    return x @ head.T


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal attention's output [B, T, C] for q, k, v [B, T, heads, head_dim]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"its activation is {name}, not a GELU or SiLU")
    return _ACTIVATIONS[name]
