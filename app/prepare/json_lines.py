"""JSON lines: one thread cuts the file into blocks of whole lines, many threads parse them.

Python's `json` defines the meaning of a line and which lines are refused, but it holds the
interpreter's lock. Arrow's parser does not: it parses each block that it is known to read alike.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from app.prepare.documents import Fault, Texts
from app.prepare.texts import arrow_texts, as_texts, utf8_fault

_BLOCK_BYTES = 4 << 20
_NEWLINE, _QUOTE, _BACKSLASH = b'\n"\\'
_BLANKS = b" \t\r"
# Here Arrow accepts more than Python: Inf, integers of any length, two values in a line.
_NOT_FOR_ARROW = re.compile(rb"[NI]|[0-9]{600}|\}[^,\]}\n]")
# Counting the backslashes of a long run takes long.
_MANY_BACKSLASHES = b"\\" * 100
# Python refuses about a thousand nested levels.
_MAX_DEPTH = 500
_LINE_FIX = "write one JSON object a line, or remove the line"
_LEVELS = np.zeros(256, np.int8)
_LEVELS[list(b"[{")] = 1
_LEVELS[list(b"]}")] = -1


def line_blocks(lines: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield blocks of whole lines, of about four megabytes or one longer line."""
    while block := lines.read(_BLOCK_BYTES):
        yield block if block.endswith(b"\n") else block + lines.readline()


def count_lines(block: bytes) -> int:
    """Return the number of lines; the last may lack its line end."""
    ends = np.count_nonzero(_bytes(block) == _NEWLINE)
    return int(ends) + (not block.endswith(b"\n"))


def end_of_lines(block: bytes, lines: int) -> int:
    """Return where the first `lines` lines end."""
    if lines == 0:
        return 0
    ends = np.flatnonzero(_bytes(block) == _NEWLINE)
    return int(ends[lines - 1]) + 1 if lines <= ends.size else len(block)


def may_have_key(block: bytes, key: str) -> bool:
    """Return False if no object in the block has this key."""
    # A key that is spelled in another way has an escape.
    return key.encode("utf-8", "replace") in block or b"\\" in block


def objects(block: bytes) -> Iterator[dict[str, Any] | Fault]:
    """Yield the object of each line, or why the line is none; an empty one for a blank line."""
    for line in io.BytesIO(block):
        yield _object(line) if line.strip() else {}


def texts_of_lines(block: bytes, column: str) -> Texts:
    """Return the texts of lines; empty where a line has none.

    Args:
        block: whole lines.
        column: the text's name.
    """
    if _is_plain(block):
        try:
            return arrow_texts(_parsed(block, column))
        except (ValueError, OverflowError):
            pass  # Arrow refuses it, or it is too large for Arrow.
    rows = list(objects(block))
    texts = as_texts([None if isinstance(row, Fault) else row.get(column) for row in rows])
    bad_lines = {number: row for number, row in enumerate(rows) if isinstance(row, Fault)}
    return texts._replace(faults=dict(sorted({**texts.faults, **bad_lines}.items())))


def _object(line: bytes) -> dict[str, Any] | Fault:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return utf8_fault(line) or Fault(f"is not UTF-8: {error}", _LINE_FIX)
    except json.JSONDecodeError as error:
        # Its message counts lines, too, from 1 in every line.
        return Fault(f"is not JSON: {error.msg}, column {error.colno:,}", _LINE_FIX)
    except RecursionError:
        return Fault("is not JSON: it is nested too deeply", _LINE_FIX)
    except ValueError:
        return Fault("has a number of too many digits", "shorten it, or remove the line")
    if not isinstance(row, dict):
        return Fault("is not a JSON object", 'write one object a line, such as {"text": "…"}')
    return row


def _parsed(block: bytes, column: str) -> pa.ChunkedArray:
    """Return the column, large_string [objects]; null where an object lacks it."""
    return pyarrow.json.read_json(
        pa.BufferReader(block),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
        pyarrow.json.ParseOptions(
            explicit_schema=pa.schema({column: pa.large_string()}),
            unexpected_field_behavior="ignore",
        ),
    ).column(0)


def _is_plain(block: bytes) -> bool:
    """Return True if Arrow either refuses this block or reads it as `json` would.

    It refuses invalid JSON, half a surrogate pair, and an object that has the column twice.
    """
    if _MANY_BACKSLASHES in block or not _is_utf8(block):
        return False
    outside = _outside_strings(_bytes(block))
    if np.cumsum(_LEVELS[outside], dtype=np.int32).max(initial=0) > _MAX_DEPTH:
        return False
    skeleton = outside.tobytes().removesuffix(b"\n").translate(None, _BLANKS)
    # To Arrow a line end is a blank like any other, so each line must hold a whole object.
    return (
        skeleton.startswith(b"{")
        and skeleton.count(b"}\n{") == skeleton.count(b"\n")
        and not _NOT_FOR_ARROW.search(skeleton)
    )


def _is_utf8(block: bytes) -> bool:
    if block.isascii():
        return True
    ends = np.array([0, len(block)], np.int64)
    text = pa.LargeStringArray.from_buffers(1, pa.py_buffer(ends), pa.py_buffer(block))
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _outside_strings(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a block's bytes outside strings, and the quote that ends each string."""
    quotes = np.flatnonzero(data == _QUOTE)
    # A quote is escaped if an odd number of backslashes precedes it.
    before = quotes - 1
    is_escaped = np.zeros(quotes.size, np.bool_)
    while (follows := data[before] == _BACKSLASH).any():
        is_escaped ^= follows
        before -= follows
    quotes = quotes[~is_escaped]
    starts = np.append(0, quotes[1::2])
    lengths = np.append(quotes[::2], data.size)[: starts.size] - starts
    skipped = starts - (np.cumsum(lengths) - lengths)
    return data[np.arange(lengths.sum()) + np.repeat(skipped, lengths)]


def _bytes(block: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(block, np.uint8)
