"""The tokenizer's files in the real tokenizers and transformers."""

import hashlib
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from app.data.tokenizer import END_OF_TEXT, VOCABULARY
from app.tools.export.tokenizer_files import TOKENIZER_FILES, tokenizer_files

TEXTS = (
    "",
    " ",
    "Hello, I'm a language model,",
    "it's I'LL  two  spaces\n\n\ttab \r\n   ",
    "trailing spaces   ",
    "\x00" + "".join(map(chr, range(0x20))) + "\x7f\x80\x9f",
    "\ufeff\u200b\u2028\u0301\u00a0 \u3000",
    "\U0010ffff\U000e0001😀👩‍👩‍👧‍👦",
    "١٢٣ ⅷ ² 한국어 日本語 ไทย हिन्दी Ελληνικά",
    "ﬁ ½ Å é ñ",
    "def f(x):\n        return x**2  # 1_000.5e-3",
    "a . b , c 's do n't",
    "[MASK] <pad> </s> <|im_start|> <|end of text|>",
)
WITH_SPECIAL = (
    "a<|endoftext|>b",
    "<|endoftext|>" * 3,
    " <|endoftext|> \n<|endoftext|>\n",
    "<|endoftext|>Once upon a time",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(1024).items():
        (place / name).write_bytes(content)
    return place


@pytest.fixture(scope="module", params=("all files", "vocab.json and merges.txt"))
def theirs(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    """Loaded by transformers, which takes tokenizer.json where there is one."""
    if request.param == "all files":
        return AutoTokenizer.from_pretrained(folder)
    place = tmp_path_factory.mktemp("old")
    for name in set(TOKENIZER_FILES) - {"tokenizer.json"}:
        (place / name).write_bytes((folder / name).read_bytes())
    return AutoTokenizer.from_pretrained(place)


@pytest.mark.parametrize("text", (*TEXTS, *WITH_SPECIAL))
def test_tricky_text_has_tiktokens_tokens(
    theirs: PreTrainedTokenizerBase, gpt2: tiktoken.Encoding, text: str
) -> None:
    tokens = theirs(text)["input_ids"]
    assert tokens == gpt2.encode(text, allowed_special="all")
    assert theirs.decode(tokens) == text
    ordinary = theirs(text, split_special_tokens=True)["input_ids"]
    assert ordinary == gpt2.encode_ordinary(text)


@settings(max_examples=300)
@given(text=st.text())
def test_any_text_has_tiktokens_tokens(
    theirs: PreTrainedTokenizerBase, gpt2: tiktoken.Encoding, text: str
) -> None:
    assert theirs(text, split_special_tokens=True)["input_ids"] == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("text", (*TEXTS, *WITH_SPECIAL))
def test_tokenizers_library_reads_its_file(
    folder: Path, gpt2: tiktoken.Encoding, text: str
) -> None:
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    assert fast.encode(text).ids == gpt2.encode(text, allowed_special="all")


def test_vocabulary_is_the_published_one(folder: Path) -> None:
    for ours, published in (("merges.txt", "vocab.bpe"), ("vocab.json", "encoder.json")):
        digest = hashlib.sha256((folder / ours).read_bytes()).hexdigest()
        assert digest == VOCABULARY[published]


def test_special_tokens_and_length_are_those_of_the_model(theirs: PreTrainedTokenizerBase) -> None:
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.unk_token_id == END_OF_TEXT
    assert len(theirs) == END_OF_TEXT + 1
    assert theirs.model_max_length == 1024


def test_files_are_those_listed(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        if name.endswith(".json"):
            assert json.loads((folder / name).read_bytes())
