"""The end of held-out local text: a document is cut at a paragraph, the rest is trained on.

A large dataset of many documents loses nothing that matters if the document in which the held-out
tokens end is left out of both splits. One file, or a few, would lose most of their text.
"""

import re
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from app.data.tokenizer import token_byte_lengths
from app.dataset_names import COMPRESSIONS, kind_of
from app.prepare.documents import Batch, Documents, Position
from app.prepare.encoder import DocumentEncoder
from app.prepare.listing import SourceFile
from app.prepare.local_files import FileDocuments
from app.prepare.spec import DatasetSpec
from app.prepare.text_streams import BadFileError, encoding_of
from app.prepare.texts import joined, text_bytes

# The largest shares of the text to hold out, and to leave out of both splits.
_SHARE = 0.05
_BEGIN = Position(0, 0)
# Encoding stops where the tokens that are wanted are surely reached.
_MAX_BYTES_PER_TOKEN = 8
_USUAL_BYTES_PER_TOKEN = 4
_BREAKS = {
    "a blank line in": re.compile(rb"\n[ \t\r]*\n"),
    "a line end in": re.compile(rb"\n"),
    "a space in": re.compile(rb"\s"),
    "a character in": re.compile(rb"(?=[^\x80-\xbf])", re.DOTALL),
}
# Bytes of a letter, where that is more than one.
_WIDTHS = {"utf-16": 2, "utf-32": 4}
_NO_BREAK = "the beginning of"


@dataclass(frozen=True)
class Cut:
    """The end of held-out text.

    Attributes:
        file, row: position of the document in which it ends
        bytes: how much of that document is held out; 0: nothing
        tokens: of all held-out text
        message: a line for the console
    """

    file: int
    row: int
    bytes: int
    tokens: int
    message: str

    @classmethod
    def load(cls, stored: Mapping[str, Any] | None) -> Self | None:
        """Return the cut that a manifest has as a dictionary, if any."""
        return cls(**stored) if stored else None

    def row_in(self, batch: Batch) -> int | None:
        """Return which row of the batch is cut; None if none is."""
        first = 0
        for chunk in batch.chunks:
            if self.bytes and chunk.first <= (self.file, self.row) < chunk.end:
                return first + self.row - chunk.first.row
            first += chunk.rows
        return None

    def split(self, rows: pa.LargeStringArray, row: int) -> pa.LargeStringArray:
        """Return the rows with one more: the rest of `row`, as a document of its own."""
        ends, data = text_bytes(rows)
        text = data[ends[row] : ends[row + 1]].tobytes()
        halves = joined([text[: self.bytes], text[self.bytes :]])
        return pa.concat_arrays([rows[:row], halves, rows[row + 1 :]])


def find_cut(spec: DatasetSpec, documents: Documents, encoder: DocumentEncoder) -> Cut | None:
    """Return where held-out text ends, if not simply after PREPARE_VAL_TOKENS tokens.

    It ends earlier in little text, unless PREPARE_VAL_TOKENS is set, and at a paragraph in a text
    file that is a large part of the text, so that its rest can be trained on.
    """
    if not spec.val_tokens or not isinstance(documents, FileDocuments):
        return None
    if documents.source.get("dataset") != "files":
        return None
    size = _text_size(documents)
    limit = most = _MAX_BYTES_PER_TOKEN * spec.held_out_tokens
    if spec.sequence_tokens:
        enough = 1.5 * _USUAL_BYTES_PER_TOKEN * spec.sequence_tokens
        limit = int(min(most, max(_SHARE * size, enough)))
    if limit == most and not any(_is_large(file, size) for file in documents.files):
        return None
    read = tokens = 0
    with closing(documents.chunks(_BEGIN)) as chunks:
        for chunk in chunks:
            rows = chunk.texts().rows
            ends, data = text_bytes(rows)
            sizes = np.append(0, np.cumsum(np.diff(ends))) + read
            whole = int(np.searchsorted(sizes[1:], limit, side="right"))
            counts = np.append(0, np.cumsum(encoder.encode(rows[:whole])[1])) + tokens
            row = int(np.searchsorted(counts[1:], spec.held_out_tokens, side="right"))
            read, tokens = int(sizes[row]), int(counts[row])
            if row < len(rows):
                break
        else:
            return None
    position = Position(chunk.first.file, chunk.first.row + row)
    text = data[ends[row] : ends[row + 1]].tobytes()
    low, high, is_full = _bounds(spec, encoder, text[: limit - read], tokens)
    if is_full or row < whole or limit == most:
        # Only a large loss is a reason to hold out another number of tokens.
        is_cut = spec.sequence_tokens or _is_plain(chunk.place.name)
        if not is_cut or len(text) - high <= _SHARE * size:
            return None
    # Half of it in whole documents: the one that would be cut is trained on.
    is_enough = 0 < spec.sequence_tokens < tokens and read >= limit / 2
    kind, end = (_NO_BREAK, 0) if is_enough else _last_break(text, low, high)
    if end:
        tokens += int(encoder.encode(joined([text[:end]]))[1][0])
    read += end
    packed = (*COMPRESSIONS, ".parquet")
    is_known = not any(file.name.lower().endswith(packed) for file in documents.files)
    share = f"first {100 * read / size:.2g} %" if is_known else "beginning"
    name = chunk.place.of_row(chunk.place.name, position.row)
    message = f"held out: the {share} of the text, up to {kind} {name}; {tokens:,} tokens"
    return Cut(*position, end, tokens, message) if tokens else None


def _bounds(
    spec: DatasetSpec, encoder: DocumentEncoder, text: bytes, tokens: int
) -> tuple[int, int, bool]:
    """Return the fewest and the most bytes of a text to hold out, after `tokens` tokens.

    Also True if it has more tokens than are to be held out.
    """
    # The last character may lack bytes.
    encoded = encoder.encode(joined([text.decode(errors="ignore").encode()]))[0][1:]
    most, least = (
        count - tokens - 1 for count in (spec.held_out_tokens, round(1.1 * spec.sequence_tokens))
    )
    low, high = len(text) // 2, len(text)
    if least > encoded.size // 2 or most < encoded.size:
        ends = np.append(0, np.cumsum(token_byte_lengths()[encoded]))
        high = int(ends[np.clip(most, 0, encoded.size)])
        low = min(high, max(high // 2, int(ends[np.clip(least, 0, encoded.size)])))
    return low, high, most < encoded.size


def _last_break(text: bytes, low: int, high: int) -> tuple[str, int]:
    """Return the kind and the place of the best break in text[low:high]; 0 if there is none."""
    for kind, pattern in _BREAKS.items():
        ends = [found.end() for found in pattern.finditer(text, low, high)]
        if ends and ends[-1]:
            return kind, ends[-1]
    return _NO_BREAK, 0


def _text_size(documents: FileDocuments) -> int:
    """Return the size of all text in UTF-8, if it is in the encoding of the first file."""
    size, width = sum(file.bytes for file in documents.files), 1
    with suppress(BadFileError, OSError), documents.open(documents.files[0]) as raw:
        encoding = encoding_of(raw.read(4096), documents.encoding)
        width = next((n for name, n in _WIDTHS.items() if encoding.startswith(name)), 1)
    return size // width


def _is_plain(name: str) -> bool:
    """Return True for files that hold text only, of which a document may be all."""
    return kind_of(name) in (".txt", ".md", ".py")


def _is_large(file: SourceFile, size: int) -> bool:
    """Return True if one document may be a large part of text of `size` bytes."""
    is_compressed = file.name.lower().endswith(COMPRESSIONS)
    return _is_plain(file.name) and (is_compressed or file.bytes > _SHARE * size)
