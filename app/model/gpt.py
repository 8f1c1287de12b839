"""The GPT: the mathematics of GPT-2 with the attention output scaled by 1/sqrt(2·layers).

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-norm blocks,
learned positions, tied embedding and head. GELU is exact, not the tanh approximation.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.model.cross_entropy import output_loss
from app.model.kv_cache import KeyValueCache, LayerCache


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 124M."""

    context_length: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    embd_size: int = 768
    num_heads: int = 12

    def __post_init__(self) -> None:
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
    """Two linear layers with a GELU between them.

    The hidden layer is four times as wide as the residual stream.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.embd_size, 4 * config.embd_size)
        self.c_proj = nn.Linear(4 * config.embd_size, config.embd_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        return cast(Tensor, self.c_proj(F.gelu(self.c_fc(x))))


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


class GPT(nn.Module):
    """A GPT language model. Weights are initialized from N(0, 0.02), biases to zero.

    Args:
        config: the model's shape.
        bf16_residual: under autocast, keep the residual stream in autocast's dtype, not float32.
        zero_init: initialize the output projections of attention and MLP to zero, so that the
            residual stream begins as the embedding.

    Attributes:
        stacked_matrices: end of a parameter's name -> how many matrices of equal shape it stores,
            one below the other.
    """

    stacked_matrices: ClassVar[dict[str, int]] = {"attn.c_attn.weight": 3}

    def __init__(
        self, config: GPTConfig, *, bf16_residual: bool = False, zero_init: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.bf16_residual = bf16_residual
        self.transformer = Transformer(config)
        self.apply(_init_weights)
        if zero_init:
            for name, parameter in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.zeros_(parameter)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits of the token after each position, or their loss.

        Args:
            idx: token ids, int [B, T], T at most the context length.
            targets: int64 [B, T], the token that follows each position.

        Returns:
            logits [B, T, vocab] without targets; with them the mean loss, a float32 scalar in nats
            per token.
        """
        x = self.embed(idx)
        for block in self.transformer.h:
            x = block(x)
        if targets is not None:
            return self.loss(x, targets)
        return F.linear(self.transformer.ln_f(x), self.transformer.wte.weight)

    def next_logits(self, idx: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the token after the last one, [B, vocab].

        Args:
            idx: the tokens after those in the cache, int [B, T]; T must be 1 unless it is empty.
            cache: `idx` is appended to it.
        """
        x = self.embed(idx, cache.length)
        for block, layer in zip(self.transformer.h, cache.layers, strict=True):
            x = block(x, layer)
        return F.linear(self.transformer.ln_f(x[:, -1]), self.transformer.wte.weight)

    def embed(self, idx: Tensor, first: int = 0) -> Tensor:
        """Map token ids int [B, T], from position `first` on, to the residual stream [B, T, C]."""
        end = first + idx.shape[1]
        assert end <= self.config.context_length, "longer than the context"
        positions = torch.arange(first, end, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        if self.bf16_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return cast(Tensor, x)

    def loss(self, x: Tensor, targets: Tensor, *, fp8: bool = False) -> Tensor:
        """Return the mean loss, a float32 scalar in nats per token.

        Args:
            x: output of the last block, [B, T, C].
            targets: int64 [B, T].
            fp8: see app.model.cross_entropy.output_loss.
        """
        weight = self.transformer.wte.weight
        return output_loss(self.transformer.ln_f(x), weight, targets, fp8=fp8)

    def num_parameters(self) -> int:
        """Return the number of trained values; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Return the floating-point operations of a forward and backward pass, per token.

        6 for each weight of a matrix product, and 6·L·T·C for causal attention: half of the full
        square's 12·L·T·C (PaLM, Chowdhery et al. 2022, appendix B).
        """
        config = self.config
        matrices = sum(
            weight.numel() for name, weight in self.named_parameters() if weight.ndim == 2
        )
        positions = self.transformer.wpe.weight.numel()
        attention = 6 * config.num_layers * config.context_length * config.embd_size
        return 6 * (matrices - positions) + attention


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
