"""Texts in Arrow's layout: from Python values, from columns, and as bytes."""

import codecs
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from app.prepare.documents import Fault, Texts

NO_TEXT_FIX = "set PREPARE_TEXT_COLUMN to the column that holds the text"


def as_texts(values: Sequence[object]) -> Texts:
    """Return Python values as texts; None becomes an empty text, any other value a fault."""
    encoded: list[bytes] = []
    faults: dict[int, Fault] = {}
    replaced: list[int] = []
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            reason = f"has {type(value).__name__}, not text, in the text column: {value!r:.80}"
            faults[row] = Fault(reason, NO_TEXT_FIX)
            value = None
        try:
            encoded.append((value or "").encode())
        except UnicodeEncodeError:
            # JSON can hold half a surrogate pair, which has no UTF-8; tiktoken replaces it like
            # this.
            text = str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            encoded.append(text.encode())
            replaced.append(row)
    return Texts(joined(encoded), faults, replaced)


def joined(texts: Sequence[bytes]) -> pa.LargeStringArray:
    """Return UTF-8 texts as an array, large_string [rows]."""
    # pa.array would import pandas where it is installed, which takes longer than reading a file.
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    buffers = pa.py_buffer(ends), pa.py_buffer(b"".join(texts))
    return pa.LargeStringArray.from_buffers(len(texts), *buffers)


def is_text(kind: pa.DataType) -> bool:
    """Return True for columns of strings, of bytes, or of nulls only."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_null,
    )
    return any(check(kind) for check in checks)


def arrow_texts(column: pa.ChunkedArray) -> Texts:
    """Return a column as texts; null becomes an empty text, bytes that are not UTF-8 a fault.

    Args:
        column: see is_text.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return as_texts([None] * len(column))
    if not pa.types.is_large_string(column.type):
        # It takes 20 ms to import, and lines of JSON do not need it.
        import pyarrow.compute as pc

        # Some writers store text without a mark that it is text.
        column = column.cast(options=pc.CastOptions(pa.large_string(), allow_invalid_utf8=True))
    if column.null_count:
        column = column.fill_null("")
    return utf8_texts(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())


def utf8_texts(texts: pa.LargeStringArray) -> Texts:
    """Return texts whose bytes may not be UTF-8, large_string [rows] without nulls."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        ends, data = text_bytes(texts)
        contents = [data[begin:end].tobytes() for begin, end in itertools.pairwise(ends)]
        faults = {row: utf8_fault(content) for row, content in enumerate(contents)}
        rows = joined([b"" if faults[row] else content for row, content in enumerate(contents)])
        return Texts(rows, {row: fault for row, fault in faults.items() if fault})
    return Texts(texts)


def utf8_fault(content: bytes, *, errors: str = "strict", is_cut: bool = False) -> Fault | None:
    """Return what keeps bytes from being UTF-8 text; None if they are.

    Args:
        errors: see codecs; json accepts "surrogatepass".
        is_cut: the last character may lack bytes.
    """
    try:
        codecs.utf_8_decode(content, errors, not is_cut)
    except UnicodeDecodeError as error:
        return Fault(
            f"is not UTF-8: byte {error.start:,} is {content[error.start]:#04x}",
            "convert it with `iconv`, or set PREPARE_ENCODING to the encoding of the text files, "
            "such as cp1252, gb18030 or utf-16-le",
        )
    return None


def text_bytes(texts: pa.LargeStringArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return offsets, int64 [rows + 1], into the UTF-8 bytes of `texts`, and these; no copies."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return ends, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
