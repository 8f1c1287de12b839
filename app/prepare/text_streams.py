"""Files of text as streams of UTF-8 bytes: decompressed, and converted from other encodings."""

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import zstandard

from app.prepare.documents import Fault

# Separates the documents of a .txt file, as in TinyStories' files.
MARK = b"<|endoftext|>"
UTF_8 = "utf-8"
_LINE_ENDS = (b"\r\n", b"\n")
_BLOCK_BYTES = 4 << 20
_BUFFER_BYTES = 1 << 17
# The largest window that zstd writes (`zstd --ultra --long=31`).
_MAX_WINDOW_BYTES = 1 << 31
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: UTF_8,
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Western text without a byte order mark: the zero bytes (0) among four consecutive ones.
_ZERO_BYTES = {"x0x0": "utf-16-le", "0x0x": "utf-16-be", "x000": "utf-32-le", "000x": "utf-32-be"}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class BadFileError(Exception):
    """A file is not the text that its name promises."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


def text_stream(raw: BinaryIO, name: str, encoding: str = "") -> io.BufferedIOBase:
    """Return a file's text as UTF-8, without a byte order mark.

    Args:
        raw: the file.
        name: its ending tells how the file is compressed.
        encoding: of text without a byte order mark. By default UTF-8, or the UTF-16 or UTF-32 that
            is recognized by its zero bytes.

    Raises:
        BadFileError: the file holds no text.
        Exception: reading a damaged file raises the exception of a decompressor or decoder; see
            app.prepare.local_files.file_fault.
    """
    stream = decompressed(raw, name)
    head = stream.peek(_BUFFER_BYTES)
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return stream
    encoding = encoding_of(head, encoding)
    if encoding == UTF_8:
        return stream
    return io.BufferedReader(_Pieces(_transcoded(stream, encoding), stream), _BUFFER_BYTES)


def encoding_of(head: bytes, encoding: str = "") -> str:
    """Return the encoding of a text from its first bytes.

    Args:
        encoding: see text_stream.

    Raises:
        BadFileError: the bytes are not text.
    """
    check_no_pointer(head)
    if not encoding and head.isascii() and b"\0" not in head:
        return UTF_8
    marked = (name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark))
    return codecs.lookup(next(marked, encoding) or _encoding_by_zeros(head[:4096])).name


def check_no_pointer(head: bytes) -> None:
    """Raise BadFileError for a file that git-lfs has not downloaded."""
    if head.startswith(_LFS_POINTER):
        fix = "run `git lfs pull` where it was cloned"
        raise BadFileError(Fault("is a git-lfs pointer, not the file itself", fix))


def split_documents(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the texts between the `<|endoftext|>` of a stream; without any, the whole text.

    The line end that follows the mark belongs to it; what is blank between two marks is no
    document.
    """
    text, searched, is_marked, at_end = bytearray(), 0, False, False
    while not at_end:
        block = stream.read(_BLOCK_BYTES)
        text += block
        at_end = not block
        # A mark and its line end may continue in the next block.
        unsafe = 0 if at_end else len(MARK) + 2
        while 0 <= (mark := text.find(MARK, searched)) <= len(text) - unsafe:
            end = mark + len(MARK)
            end += next((len(line) for line in _LINE_ENDS if text.startswith(line, end)), 0)
            document = bytes(memoryview(text)[:mark])
            del text[:end]
            searched, is_marked = 0, True
            if document and not document.isspace():
                yield document
        searched = max(0, len(text) - unsafe)
    if not is_marked or (text and not text.isspace()):
        yield bytes(text)


def decompressed(raw: BinaryIO, name: str) -> io.BufferedReader:
    """Return the content of a file that is compressed as its name says."""
    match name.lower().rpartition(".")[2]:
        # Like a BufferedReader, these have read, readline and peek; one around them takes time.
        case "gz":
            return cast(io.BufferedReader, gzip.open(raw))
        case "bz2":
            return cast(io.BufferedReader, bz2.open(raw))
        case "xz":
            return cast(io.BufferedReader, lzma.open(raw))
        case "zst":
            return io.BufferedReader(_Pieces(_zstd_frames(raw), raw), _BUFFER_BYTES)
        case _:
            return io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER_BYTES)


def _zstd_frames(raw: BinaryIO) -> Iterator[bytes]:
    # The package's own reader does not notice that the end of a frame is missing.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    frame = None
    while data := raw.read(_BUFFER_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the end of the compressed data is missing")


def _encoding_by_zeros(head: bytes) -> str:
    if b"\0" not in head:
        return UTF_8
    quarter = max(1, len(head) // 4)
    zeros = [head[place::4].count(0) / quarter for place in range(4)]
    if all(share < 0.05 or share > 0.3 for share in zeros):
        pattern = "".join("0" if share > 0.3 else "x" for share in zeros)
        if pattern in _ZERO_BYTES:
            return _ZERO_BYTES[pattern]
    raise BadFileError(
        Fault(
            f"is a binary file: byte {head.index(0)} is zero",
            "remove it, or convert it to text in UTF-8",
        )
    )


def _transcoded(stream: io.BufferedIOBase, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while block := stream.read(_BUFFER_BYTES):
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


class _Pieces(io.RawIOBase):
    """A readable file made of pieces that are produced one by one from another file."""

    def __init__(self, pieces: Iterator[bytes], source: object) -> None:
        self._pieces, self._piece = pieces, memoryview(b"")
        # After the last piece nothing else refers to the other file, which would be closed.
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        target = memoryview(buffer)
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count
