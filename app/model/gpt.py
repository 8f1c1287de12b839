"""The GPT: the mathematics of GPT-2 with the attention output scaled by 1/sqrt(2·layers).

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-norm blocks,
learned positions, tied embedding and head. GELU is exact, or approximated with tanh as in GPT-2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.model.kv_cache import LayerCache
from app.model.language_model import LanguageModel, ModelConfig, init_weights

# The values of MODEL_ACTIVATION.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Shape of a GPT; the defaults are GPT-2 124M."""

    context_length: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    embd_size: int = 768
    num_heads: int = 12
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation {self.activation!r}")
        if self.embd_size % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {self.embd_size}")


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.c_attn = nn.Linear(config.embd_size, 3 * config.embd_size)
        self.c_proj = nn.Linear(config.embd_size, config.embd_size)
        self.output_scale = 1 / math.sqrt(2 * config.num_layers)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map x [B, T, C] to [B, T, C], with the output scaled by 1/sqrt(2·layers).

        Args:
            cache: holds the earlier tokens, which x attends to as well. T must be 1 unless
                the cache is empty.
        """
        B, T, C = x.shape
        heads = (B, T, self.num_heads, C // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(k, v)
        # A single new token attends to all others, which come before it.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=k.shape[2] == T)
        # In training, scaling the projection's weights costs less than scaling its output.
        weight, bias = (self.output_scale * part for part in self.c_proj.parameters())
        return F.linear(y.transpose(1, 2).reshape(B, T, C), weight, bias)


class MLP(nn.Module):
    """Two linear layers with the activation between them.

    The hidden layer is four times as wide as the residual stream.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.embd_size, 4 * config.embd_size)
        self.c_proj = nn.Linear(4 * config.embd_size, config.embd_size)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        return cast(Tensor, self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP; each adds to the residual stream, whose normalized copy it reads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.embd_size)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.embd_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        x = x + self.attn(self.ln_1(x), cache)
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Embeddings, blocks and final norm; `transformer` in the names of GPT-2's weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.embd_size)
        self.wpe = nn.Embedding(config.context_length, config.embd_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.embd_size)


class GPT(LanguageModel):
    """A GPT language model. Weights are initialized from N(0, 0.02), biases to zero.

    Args:
        config: the model's shape.
        bf16_residual: under autocast, keep the residual stream in autocast's dtype, not float32.
        zero_init: initialize the output projections of attention and MLP to zero, so that
            each block begins as the identity.
    """

    config: GPTConfig
    stacked_matrices: ClassVar[dict[str, int]] = {"attn.c_attn.weight": 3}

    def __init__(
        self, config: GPTConfig, *, bf16_residual: bool = False, zero_init: bool = False
    ) -> None:
        super().__init__(config, bf16_residual=bf16_residual)
        self.transformer = Transformer(config)
        self.apply(init_weights)
        if zero_init:
            for name, parameter in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.zeros_(parameter)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the blocks."""
        return self.transformer.h

    def embed(self, idx: Tensor, first: int = 0) -> Tensor:
        """Map token ids int [B, T], from position `first` on, to the residual stream [B, T, C]."""
        end = first + idx.shape[1]
        assert end <= self.config.context_length, "longer than the context"
        positions = torch.arange(first, end, device=idx.device)
        return self.residual_stream(self.transformer.wte(idx) + self.transformer.wpe(positions))

    def final_norm(self, x: Tensor) -> Tensor:
        """Normalize the output of the last block, [..., C]."""
        return cast(Tensor, self.transformer.ln_f(x))

    @property
    def head_weight(self) -> Tensor:
        """Return the output layer's weight [vocab, C]: the embedding's."""
        return self.transformer.wte.weight
