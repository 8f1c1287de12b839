"""The shards of a split as one stream of tokens.

Only the sequences that are read are in memory, and become int64.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from app.containers import program
from app.data.sequences import Indices
from app.data.shards import Shard, Tokens
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError

TokenIds = npt.NDArray[np.int64]


class TokenStream:
    """The shards of a split as one stream.

    Args:
        shards: files, or uint16 [count] each, in order.
    """

    def __init__(self, shards: Sequence[Shard | Tokens]) -> None:
        self._shards = list(shards)
        self._ends = list(accumulate(shard.size for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, out: Tokens) -> None:
        """Copy tokens start … start+len(out)-1 into `out`, from as many shards as they span."""
        shard = bisect_right(self._ends, start)
        filled = 0
        while filled < out.size:
            tokens, left = self._shards[shard], self._ends[shard] - start - filled
            begin, part = tokens.size - left, out[filled : filled + left]
            part[:] = tokens[begin : begin + part.size]
            filled += part.size
            shard += 1

    def sequences(self, indices: Indices, context_length: int) -> tuple[TokenIds, TokenIds]:
        """Return inputs and targets of sequences, int64 [len(indices), context_length] each.

        Raises:
            UserError: a token is not in the vocabulary.
        """
        tokens = np.empty((len(indices), context_length + 1), dtype=np.uint16)
        for row, index in zip(tokens, indices, strict=True):
            self.read(int(index) * context_length, row)
        if tokens.size and tokens.max() > END_OF_TEXT:
            raise UserError(
                f"the dataset holds token {tokens.max()}, GPT-2's vocabulary ends at {END_OF_TEXT}",
                f"prepare it again; `{program()} inspect` names the shard",
            )
        return tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
