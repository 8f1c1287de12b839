"""Keys and values of the tokens so far, so that only a new token's column is computed."""

from torch import Tensor


class LayerCache:
    """One layer's keys and values.

    Args:
        capacity: largest number of tokens; the memory is allocated at the first append.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffer: Tensor | None = None
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens.

        Args:
            k, v: [B, heads, T, head_dim]; T is 1 unless the cache is empty.

        Returns:
            keys and values of all tokens so far, [B, heads, length, head_dim] each: views.
        """
        first, self.length = self.length, self.length + k.shape[2]
        assert first == 0 or k.shape[2] == 1, "several new tokens would need a mask"
        assert self.length <= self._capacity, "the cache is full"
        if self._buffer is None:
            B, heads, _, width = k.shape
            self._buffer = k.new_empty((2, B, heads, self._capacity, width))
        keys, values = self._buffer
        keys[:, :, first : self.length] = k
        values[:, :, first : self.length] = v
        return keys[:, :, : self.length], values[:, :, : self.length]

    def clear(self) -> None:
        """Remove all tokens; the memory stays allocated."""
        self.length = 0


class KeyValueCache:
    """The keys and values of all layers: 2·heads·head_dim numbers per token and layer.

    Args:
        num_layers: layers of the model.
        capacity: largest number of tokens, at most the context length.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Return the number of tokens so far."""
        return self.layers[0].length

    def clear(self) -> None:
        """Remove all tokens; the memory stays allocated."""
        for layer in self.layers:
            layer.clear()
