"""Documents to tokens, in bulk.

gigatoken gives tiktoken's tokens, ten times as fast; it takes and gives Arrow's layout of strings
through awkward arrays, without a copy. Where there are no vocabulary files for it, tiktoken itself
does the work.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import awkward as ak
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from gigatoken.gigatoken_rs import load_hf_json

from app.data.shards import Tokens
from app.data.tokenizer import END_OF_TEXT, Tokenizer, vocabulary_files
from app.prepare.documents import text_bytes

Lengths = npt.NDArray[np.int64]

_BYTES_OF_ONE_ENCODER = 512 << 20


@dataclass
class _Fast:
    """An encoder of gigatoken's, and how much text it has seen."""

    encoder: Any
    bytes: int = 0


class DocumentEncoder:
    """Encodes documents; several threads can use it at once.

    Args:
        exact: take tiktoken, the reference, whatever there is.

    Raises:
        NetworkError: the vocabulary is not on this machine and cannot be downloaded.
    """

    def __init__(self, *, exact: bool = False) -> None:
        files = None if exact else vocabulary_files()
        self._reference = Tokenizer() if files is None else None
        self._vocabulary = b"" if files is None else tokenizer_json(files)
        self._idle: list[_Fast] = []

    def encode(self, texts: pa.LargeStringArray) -> tuple[Tokens, Lengths]:
        """Encode documents in order, each after an `<|endoftext|>`; an empty text is none.

        Args:
            texts: large_string [rows], without nulls

        Returns:
            tokens: uint16 [total], all documents one after the other
            lengths: int64 [rows], tokens of each row, `<|endoftext|>` included; 0 if it is empty
        """
        ends, data = text_bytes(texts)
        if self._reference is None:
            content, counts = self._encode_fast(ends, data)
        else:
            parts = [self._reference.encode(text) for text in texts.to_pylist()]
            content = np.concatenate(parts or [np.empty(0, np.uint32)])
            counts = np.array([part.size for part in parts], np.int64)
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
        # One for each thread: threads that share one wait for each other.
        try:
            fast = self._idle.pop()
        except IndexError:
            fast = _Fast(load_hf_json(self._vocabulary))
        encoded = fast.encoder.encode_batch(ak.Array(strings), parallel=False).layout
        # Its cache of words only grows.
        fast.bytes += int(ends[-1] - ends[0])
        if fast.bytes < _BYTES_OF_ONE_ENCODER:
            self._idle.append(fast)
        offsets = np.asarray(encoded.offsets)
        return np.asarray(encoded.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def tokenizer_json(files: Sequence[Path]) -> bytes:
    """GPT-2 as tokenizer.json, without special tokens: `<|endoftext|>` in a text is text."""
    vocab_bpe, encoder_json = files
    _version, *merges = vocab_bpe.read_text("utf-8").splitlines()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    # To parse the vocabulary, which is JSON, would take longer than all the rest.
    return b'{"pre_tokenizer": %b, "model": {"type": "BPE", "vocab": %b, "merges": %b}}' % (
        json.dumps(byte_level).encode(),
        encoder_json.read_bytes(),
        json.dumps(merges).encode(),
    )
