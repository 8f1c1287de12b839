"""Keys and values of the tokens so far, so that a new token costs its own column only."""

from torch import Tensor


class LayerCache:
    """One layer's keys and values.

    Args:
        capacity: tokens it has room for; the memory is taken at the first append.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: Tensor | None = None
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values of new tokens.

        Args:
            k, v: [B, heads, T, C / heads]; T is 1 unless the cache is empty.

        Returns:
            those of all tokens so far: views of what is kept, [B, heads, length, C / heads] each.
        """
        first, self.length = self.length, self.length + k.shape[2]
        assert first == 0 or k.shape[2] == 1, "attention masks nothing among several new tokens"
        assert self.length <= self._capacity, "the cache is full"
        if self._kept is None:
            B, heads, _, width = k.shape
            self._kept = k.new_empty((2, B, heads, self._capacity, width))
        keys, values = self._kept
        keys[:, :, first : self.length] = k
        values[:, :, first : self.length] = v
        return keys[:, :, : self.length], values[:, :, : self.length]

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0


class KeyValueCache:
    """A GPT's keys and values: 2·C numbers a token and layer.

    Args:
        num_layers: of the GPT.
        capacity: tokens it has room for, at most the context length.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        for layer in self.layers:
            layer.clear()
