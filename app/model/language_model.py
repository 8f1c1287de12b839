"""The base of all architectures: from tokens to logits and loss, and the count of FLOPs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from app.model.cross_entropy import output_loss
from app.model.kv_cache import KeyValueCache


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, as far as all architectures have it."""

    context_length: int
    vocab_size: int
    num_layers: int
    embd_size: int
    num_heads: int

    @property
    def head_dim(self) -> int:
        """Return the size of an attention head."""
        return self.embd_size // self.num_heads


class LanguageModel(nn.Module, ABC):
    """Embedding, blocks, final norm and head; each architecture has its own.

    Args:
        config: the model's shape.
        bf16_residual: under autocast, keep the residual stream in autocast's dtype, not float32.

    Attributes:
        stacked_matrices: end of a parameter's name -> how many matrices of equal shape it stores,
            one below the other
        recompute: keep only the blocks' inputs for the backward pass, and compute the blocks again
            there (Chen et al., "Training deep nets with sublinear memory cost", 2016)
    """

    stacked_matrices: ClassVar[dict[str, int]] = {}

    def __init__(self, config: ModelConfig, *, bf16_residual: bool) -> None:
        super().__init__()
        self.config = config
        self.bf16_residual = bf16_residual
        self.recompute = False

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """Return the blocks; each maps x [B, T, C], and optionally a LayerCache, to [B, T, C]."""

    @abstractmethod
    def embed(self, idx: Tensor, first: int = 0) -> Tensor:
        """Map token ids int [B, T], from position `first` on, to the residual stream [B, T, C]."""

    @abstractmethod
    def final_norm(self, x: Tensor) -> Tensor:
        """Normalize the output of the last block, [..., C]."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """Return the output layer's weight [vocab, C], which may be the embedding's."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits of the token after each position, or their loss.

        Args:
            idx: token ids, int [B, T], T at most the context length.
            targets: int64 [B, T], the token that follows each position.

        Returns:
            logits [B, T, vocab] without targets; with them the mean loss, a float32 scalar in nats
            per token.
        """
        x = self.run_blocks(self.embed(idx))
        if targets is not None:
            return self.loss(x, targets)
        return F.linear(self.final_norm(x), self.head_weight)

    def run_blocks(
        self, x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]] | None = None
    ) -> Tensor:
        """Map the residual stream [B, T, C] to its state after the last block.

        Args:
            blocks: compiled ones, in place of the model's own.
        """
        for block in blocks or self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # There is no dropout, so no random state to preserve.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x

    def next_logits(self, idx: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the token after the last one, [B, vocab].

        Args:
            idx: the tokens after those in the cache, int [B, T]; T must be 1 unless it is empty.
            cache: `idx` is appended to it.
        """
        x = self.embed(idx, cache.length)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, layer)
        return F.linear(self.final_norm(x[:, -1]), self.head_weight)

    def residual_stream(self, x: Tensor) -> Tensor:
        """Return x in the dtype of the residual stream."""
        if self.bf16_residual and torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def loss(self, x: Tensor, targets: Tensor, *, fp8: bool = False) -> Tensor:
        """Return the mean loss, a float32 scalar in nats per token.

        Args:
            x: output of the last block, [B, T, C].
            targets: int64 [B, T].
            fp8: see app.model.cross_entropy.output_loss.
        """
        return output_loss(self.final_norm(x), self.head_weight, targets, fp8=fp8)

    def num_parameters(self) -> int:
        """Return the number of trained values; a tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_multiplied(self) -> int:
        """Return the number of weights of matrix products and convolutions, the head's included.

        They are found in the modules, so those that are added to an architecture count as well.
        """
        embeddings = {
            module.weight for module in self.modules() if isinstance(module, nn.Embedding)
        }
        matrices = {weight for weight in self.parameters() if weight.ndim > 1}
        return sum(weight.numel() for weight in matrices - embeddings | {self.head_weight})

    def flops_per_token(self) -> int:
        """Return the floating-point operations of a forward and backward pass, per token.

        6 for each weight of a matrix product, and 6·L·T·heads·head_dim for causal attention: half
        of the full square's (PaLM, Chowdhery et al. 2022, appendix B).
        """
        config = self.config
        attention = config.num_layers * config.context_length * config.num_heads * config.head_dim
        return 6 * (self.num_multiplied() + attention)


def init_weights(module: nn.Module) -> None:
    """Initialize a layer's weights from N(0, 0.02), and its biases to zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
