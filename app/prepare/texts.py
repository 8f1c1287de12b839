"""Texts in Arrow's layout: from Python values, from columns, and as bytes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from app.errors import UserError


def as_texts(values: Sequence[object], place: str, first: int = 0) -> pa.LargeStringArray:
    """Return Python values as texts, large_string [rows]; None becomes an empty text.

    Raises:
        UserError: a value is not text; names `place` and the value's number, counted from `first`.
    """
    encoded = []
    for number, value in enumerate(values, first):
        if value is not None and not isinstance(value, str):
            raise _not_text(type(value).__name__, f"{place} {number}: {value!r:.80}")
        encoded.append(_utf8(value or ""))
    # pa.array would import pandas where it is installed, which takes longer than reading a file.
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    buffers = pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))
    return pa.LargeStringArray.from_buffers(len(encoded), *buffers)


def arrow_texts(column: pa.ChunkedArray, place: str) -> pa.LargeStringArray:
    """Return a column as texts, large_string [rows]; null becomes an empty text.

    Raises:
        UserError: the column does not hold text; names `place`.
        ArrowInvalid: its bytes are not UTF-8.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_null(kind):
        return as_texts([None] * len(column), place)
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        raise _not_text(str(kind), place)
    if not pa.types.is_large_string(column.type):
        column = column.cast(pa.large_string())
    if column.null_count:
        column = column.fill_null("")
    texts = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    texts.validate(full=True)
    return texts


def text_bytes(texts: pa.LargeStringArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return offsets, int64 [rows + 1], into the UTF-8 bytes of `texts`, and these; no copies."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return ends, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        # JSON can hold half a surrogate pair, which has no UTF-8; tiktoken replaces it like this.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _not_text(kind: str, place: str) -> UserError:
    return UserError(
        f"the text column holds {kind}, not text ({place})",
        "set PREPARE_TEXT_COLUMN to the column that holds the text",
    )
