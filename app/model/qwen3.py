"""Qwen3's architecture, with as many keys and values as queries.

Yang et al., "Qwen3 technical report" (2025): pre-norm blocks, RMSNorm, rotary positions, queries
and keys normalized in each head, a gated MLP, no biases. transformers' Qwen3ForCausalLM computes
the same; its three matrices of q, k and v are one here, and so are the MLP's gate and up.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.model.config_json import qwen3_mlp_size
from app.model.kv_cache import LayerCache
from app.model.language_model import LanguageModel, ModelConfig, init_weights

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Qwen3Config(ModelConfig):
    """Shape of a Qwen3; the defaults multiply as many weights per token as GPT-2 124M."""

    context_length: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    embd_size: int = 768
    num_heads: int = 6
    head_dim: int = 128
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of values, and {self.head_dim} is odd")

    @property
    def mlp_size(self) -> int:
        """Return the width of the MLP's hidden layer: 8/3 of the stream's, in multiples of 64.

        With its third matrix the MLP is then as large as GPT-2's.
        """
        return qwen3_mlp_size(self.embd_size)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square of the last dimension, in float32, with a learned gain."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., size] to float32 [..., size]."""
        return super().forward(x.float())


class Rotary(nn.Module):
    """Rotary positions: value i and value i + size/2 of a head are turned together.

    Su et al., "RoFormer: enhanced transformer with rotary position embedding" (2021).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        positions = torch.arange(config.context_length, dtype=torch.float32)
        # [T, heads, head_dim / 2], the same for all heads.
        angles = torch.outer(positions, 1 / ROPE_THETA**exponents)[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, first: int) -> Tensor:
        """Turn x, float32 [B, T, heads, head_dim], whose positions are `first` and following."""
        cos, sin = (table[first : first + x.shape[1]] for table in (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head attention of each token to itself and to the tokens before it."""

    def __init__(self, config: Qwen3Config, rotary: Rotary) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        width = config.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.embd_size, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, config.embd_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.rotary = rotary

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map x [B, T, C] to [B, T, C].

        Args:
            cache: holds the earlier tokens, which x attends to as well. T must be 1 unless
                the cache is empty.
        """
        B, T, _ = x.shape
        first = cache.length if cache is not None else 0
        q, k, v = self.qkv_proj(x).view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        q = self.rotary(self.q_norm(q), first).to(v.dtype)
        k = self.rotary(self.k_norm(k), first).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        # A single new token attends to all others, which come before it.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=k.shape[2] == T)
        return cast(Tensor, self.o_proj(y.transpose(1, 2).reshape(B, T, -1)))


class MLP(nn.Module):
    """SwiGLU: a linear layer, multiplied by the SiLU of a second one, and a third.

    Shazeer, "GLU variants improve transformer" (2020).
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.embd_size, 2 * config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.embd_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return cast(Tensor, self.down_proj(F.silu(gate) * up))


class Block(nn.Module):
    """Attention, then the MLP; each adds to the residual stream, whose normalized copy it reads."""

    def __init__(self, config: Qwen3Config, rotary: Rotary) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.embd_size)
        self.self_attn = Attention(config, rotary)
        self.post_attention_layernorm = RMSNorm(config.embd_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, blocks and final norm; `model` in the names of Qwen3's weights."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        rotary = Rotary(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embd_size)
        self.layers = nn.ModuleList(Block(config, rotary) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embd_size)


class Qwen3(LanguageModel):
    """A Qwen3. Weights are initialized from N(0, 0.02), gains to one.

    Args:
        config: the model's shape.
        bf16_residual: under autocast, keep the residual stream in autocast's dtype, not float32.
        zero_init: initialize the output projections of attention and MLP to zero, so that
            each block begins as the identity; and an untied head.
    """

    config: Qwen3Config
    stacked_matrices: ClassVar[dict[str, int]] = {
        "self_attn.qkv_proj.weight": 3,
        "mlp.gate_up_proj.weight": 2,
    }

    def __init__(
        self, config: Qwen3Config, *, bf16_residual: bool = False, zero_init: bool = False
    ) -> None:
        super().__init__(config, bf16_residual=bf16_residual)
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.embd_size, config.vocab_size, bias=False)
        self.apply(init_weights)
        if zero_init:
            ends = ("o_proj.weight", "down_proj.weight", "lm_head.weight")
            for name, parameter in self.named_parameters():
                if name.endswith(ends):
                    nn.init.zeros_(parameter)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the blocks."""
        return self.model.layers

    def embed(self, idx: Tensor, first: int = 0) -> Tensor:
        """Map token ids int [B, T] to the residual stream [B, T, C]; the blocks see positions."""
        assert first + idx.shape[1] <= self.config.context_length, "longer than the context"
        return self.residual_stream(self.model.embed_tokens(idx))

    def final_norm(self, x: Tensor) -> Tensor:
        """Normalize the output of the last block, [..., C]."""
        return cast(Tensor, self.model.norm(x))

    @property
    def head_weight(self) -> Tensor:
        """Return the output layer's weight [vocab, C]: the embedding's if it is tied."""
        return (self.lm_head or self.model.embed_tokens).weight
