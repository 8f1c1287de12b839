"""Blocks of consecutive rows of a text file: lines of JSON, or whole documents."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import xxhash

from app.prepare.documents import Place, Position, RowChunk, Texts
from app.prepare.json_lines import count_lines, end_of_lines, texts_of_lines
from app.prepare.listing import SourceFile
from app.prepare.text_streams import MARK, split_documents
from app.prepare.texts import joined, utf8_texts

_BLOCK_BYTES = 4 << 20
_BLOCK_ROWS = 1024


@dataclass
class LineBlock:
    """Lines of JSON.

    Attributes:
        lines: whole lines
        column: the text's name
        row: what a row is, for messages
        rows: number of rows
    """

    lines: bytes
    column: str
    row: str = "line"
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = count_lines(self.lines)

    def before(self, row: int) -> bytes:
        """Return what the rows before `row` are parsed from."""
        return self.lines if row == self.rows else self.lines[: end_of_lines(self.lines, row)]

    def texts(self, row: int) -> Texts:
        """Parse the rows from `row` on."""
        return texts_of_lines(self.lines[end_of_lines(self.lines, row) :], self.column)


@dataclass
class DocumentBlock:
    """Documents of plain text; see LineBlock."""

    documents: list[bytes]
    row: str = "document"

    @property
    def rows(self) -> int:
        """Return the number of documents."""
        return len(self.documents)

    def before(self, row: int) -> bytes:
        """Return the documents before `row`, each with a mark."""
        return b"".join(document + MARK for document in self.documents[:row])

    def texts(self, row: int) -> Texts:
        """Return the documents from `row` on."""
        return utf8_texts(joined(self.documents[row:]))


def document_blocks(kind: str | None, stream: io.BufferedIOBase) -> Iterator[DocumentBlock]:
    """Yield the documents of a plain text: only a .txt file can hold several."""
    documents = split_documents(stream) if kind == ".txt" else iter([stream.read()])
    block, size, is_first = DocumentBlock([]), 0, True
    for document in documents:
        if block.rows and (size + len(document) > _BLOCK_BYTES or block.rows == _BLOCK_ROWS):
            yield block
            block, size, is_first = DocumentBlock([]), 0, False
        block.documents.append(document)
        size += len(document)
    if is_first and block.rows == 1:
        # The document is the whole file, so messages name no row.
        block.row = ""
    yield block


def chunks_of_blocks(
    file: SourceFile, raw: BinaryIO, blocks: Iterable[LineBlock | DocumentBlock], start: Position
) -> Iterator[RowChunk]:
    """Yield the rows of a file from `start` on; fractions are of the file.

    Args:
        raw: the file, which the blocks are read from.
    """
    read, row = xxhash.xxh3_128(), 0
    for block in blocks:
        first, row = row, row + block.rows
        before = read.copy()
        content = block.before(block.rows)
        read.update(content)
        if row > start.row:
            skipped = max(start.row - first, 0)
            yield RowChunk(
                Position(start.file, first + skipped),
                block.rows - skipped,
                len(content),
                partial(block.texts, skipped),
                raw.tell() / max(1, file.bytes),
                Place(file.path, file.name, block.row),
                partial(_digest, before, block, skipped),
            )


def _digest(before: xxhash.xxh3_128, block: LineBlock | DocumentBlock, first: int, row: int) -> str:
    digest = before.copy()
    digest.update(block.before(first + row))
    return digest.hexdigest()
