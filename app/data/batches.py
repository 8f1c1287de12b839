"""What every source of text is: batches of documents in a fixed order."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from app.errors import UserError

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class Batch:
    """Consecutive documents.

    Attributes:
        texts: none of them empty
        fraction: how much of the source is read once these are, in [0, 1]; None if unknown
    """

    texts: list[str]
    fraction: float | None


class Documents(Protocol):
    """A source of documents.

    Attributes:
        source: what identifies the text, for the manifest; equal sources give equal documents
        counts: `skipped` documents without text, `not_utf8` files with replaced bytes
    """

    source: Mapping[str, Any]
    counts: Counter[str]

    def batches(self) -> Iterator[Batch]:
        """All documents, in order.

        Raises:
            UserError: a file or column that cannot be read as text.
            NetworkError: the hub does not answer any more.
        """
        ...


def batched(
    pieces: Iterable[tuple[Iterable[object], float | None]], counts: Counter[str]
) -> Iterator[Batch]:
    """Gather texts into batches of a useful size, leaving out and counting the empty ones.

    Args:
        pieces: texts, and how much of the source is read after them.
        counts: `skipped` grows by the texts left out.

    Raises:
        UserError: a value is not text.
    """
    texts: list[str] = []
    characters = 0
    fraction: float | None = 0.0
    for values, after in pieces:
        for value in values:
            if value is None or value == "":
                counts["skipped"] += 1
                continue
            if not isinstance(value, str):
                raise UserError(
                    f"the text column holds {type(value).__name__}, not text: {value!r:.80}",
                    "set PREPARE_TEXT_COLUMN to the column that holds the text",
                )
            texts.append(value)
            characters += len(value)
            if len(texts) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield Batch(texts, fraction)
                texts, characters = [], 0
        fraction = after
    if texts:
        yield Batch(texts, 1.0)
