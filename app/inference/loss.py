"""The loss of a model on held-out text."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from app.data.sequences import num_held_out
from app.data.token_stream import TokenStream
from app.data.tokenizer import token_byte_lengths
from app.hardware.device import Device
from app.model.language_model import LanguageModel


class HeldOutText:
    """The sequences of a split on which the loss is measured: the first ones of its stream.

    Args:
        stream: tokens of the split.
        context_length: tokens per sequence, T.
        max_tokens: limit on the tokens to predict, rounded down to whole sequences, at least
            one; None for all.

    Attributes:
        num_sequences: how many are measured; 0 if the stream is shorter than one
        num_tokens: tokens to predict in them
    """

    def __init__(self, stream: TokenStream, context_length: int, max_tokens: int | None) -> None:
        self._stream = stream
        self.context_length = context_length
        self.num_sequences = num_held_out(len(stream), context_length, max_tokens)
        self.num_tokens = self.num_sequences * context_length

    def num_bytes(self) -> int:
        """Return the bytes of text in the tokens to predict."""
        tokens = np.empty(self.num_tokens, dtype=np.uint16)
        self._stream.read(1, tokens)
        return int(token_byte_lengths()[tokens].sum())

    @torch.no_grad()
    def losses(
        self,
        model: LanguageModel,
        device: Device,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Measure a rank's share of the sequences, batch by batch, in the stream's order.

        Args:
            model: uncompiled: a smaller last batch would trigger a recompile.
            device: the model's, with the precision of its forward pass.
            batch_size: sequences per forward pass, B; the last batch may have fewer.
            rank, world_size: batch i belongs to rank i mod world_size.
            check_stop: called before each batch; it stops the measurement by raising.

        Yields:
            losses: the mean of each sequence, nats per token, float32 [B], on the device.
            targets: the tokens that were predicted, int64 [B, T], on the CPU.
        """
        for first in range(rank * batch_size, self.num_sequences, world_size * batch_size):
            check_stop()
            end = min(first + batch_size, self.num_sequences)
            inputs, targets = map(
                torch.from_numpy, self._stream.sequences(np.arange(first, end), self.context_length)
            )
            with device.forward_pass():
                x = model.run_blocks(model.embed(inputs.to(device.torch_device)))
                # One sequence at a time: the logits are by far the largest tensor, and training,
                # whose batch size this may be, keeps fewer of them.
                on_device = targets.to(device.torch_device)
                losses = [model.loss(x[i : i + 1], on_device[i : i + 1]) for i in range(len(x))]
            yield torch.stack(losses), targets
