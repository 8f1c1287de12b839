"""Encodes documents in bulk.

gigatoken gives the same tokens as tiktoken, ten times as fast; it reads and returns Arrow's layout
of strings as awkward arrays, without a copy. Without the vocabulary files that it needs, tiktoken
itself encodes.
"""

from dataclasses import dataclass
from typing import Any

import awkward as ak
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from gigatoken.gigatoken_rs import load_hf_json

from app.data.shards import Tokens
from app.data.tokenizer import END_OF_TEXT, Tokenizer, tokenizer_json, vocabulary_files
from app.prepare.texts import text_bytes

Lengths = npt.NDArray[np.int64]

_MAX_BYTES_PER_ENCODER = 512 << 20


@dataclass
class _FastEncoder:
    """A gigatoken encoder, and how many bytes of text it has encoded."""

    encoder: Any
    bytes: int = 0


class DocumentEncoder:
    """Encodes documents; several threads can use it at once.

    Args:
        use_reference: encode with tiktoken even if the faster encoder is available.

    Raises:
        NetworkError: the vocabulary is not on this machine and cannot be downloaded.
    """

    def __init__(self, *, use_reference: bool = False) -> None:
        files = None if use_reference else vocabulary_files()
        self._reference = Tokenizer() if files is None else None
        self._vocabulary = b"" if files is None else tokenizer_json(files)
        self._idle: list[_FastEncoder] = []

    def encode(self, texts: pa.LargeStringArray) -> tuple[Tokens, Lengths]:
        """Encode documents in order, each after an `<|endoftext|>`; an empty text is no document.

        Args:
            texts: large_string [rows], without nulls

        Returns:
            tokens: uint16 [total], of all documents, one after the other
            lengths: int64 [rows], tokens of each row with its `<|endoftext|>`; 0 for an empty text
        """
        ends, data = text_bytes(texts)
        if self._reference is None:
            content, counts = self._encode_fast(ends, data)
        else:
            encoded = [self._reference.encode(text) for text in texts.to_pylist()]
            content = np.concatenate(encoded or [np.empty(0, np.uint32)])
            counts = np.array([tokens.size for tokens in encoded], np.int64)
        is_document = np.diff(ends) > 0
        lengths = counts + is_document
        starts = (np.cumsum(lengths) - lengths)[is_document]
        tokens = np.empty(content.size + starts.size, np.uint16)
        is_text = np.ones(tokens.size, np.bool_)
        is_text[starts] = False
        tokens[starts] = END_OF_TEXT
        tokens[is_text] = content.astype(np.uint16)
        return tokens, lengths

    def _encode_fast(
        self, ends: Lengths, data: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.uint32], Lengths]:
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        strings = ak.contents.ListOffsetArray(
            ak.index.Index64(ends), characters, parameters={"__array__": "string"}
        )
        # One for each thread: threads that share an encoder wait for each other.
        try:
            fast = self._idle.pop()
        except IndexError:
            fast = _FastEncoder(load_hf_json(self._vocabulary))
        encoded = fast.encoder.encode_batch(ak.Array(strings), parallel=False).layout
        # An encoder's cache of words only grows, so it is replaced now and then.
        fast.bytes += int(ends[-1] - ends[0])
        if fast.bytes < _MAX_BYTES_PER_ENCODER:
            self._idle.append(fast)
        offsets = np.asarray(encoded.offsets)
        return np.asarray(encoded.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
