"""The bulk encoder beside tiktoken, the reference."""

import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.tokenizer import END_OF_TEXT
from app.prepare import encoder as module
from app.prepare.encoder import DocumentEncoder
from app.prepare.texts import as_texts

# All planes, and often what is rare in them: control characters, spaces, private use.
any_text = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.characters(categories=["Cc", "Z", "Co", "Mn"])
    | st.sampled_from(" \n\t'sl<|endoftext|>0123")
)


@pytest.fixture(scope="module")
def encoder() -> DocumentEncoder:
    return DocumentEncoder()


@pytest.fixture(scope="module")
def reference() -> DocumentEncoder:
    return DocumentEncoder(use_reference=True)


def assert_reference(encoder: DocumentEncoder, gpt2: tiktoken.Encoding, texts: list[str]) -> None:
    documents = [[END_OF_TEXT, *gpt2.encode_ordinary(text)] if text else [] for text in texts]
    tokens, lengths = encoder.encode(as_texts(texts).rows)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [token for document in documents for token in document]
    assert lengths.tolist() == [len(document) for document in documents]


def test_gigatoken_is_used(encoder: DocumentEncoder) -> None:
    assert encoder._reference is None


@settings(max_examples=300)
@given(texts=st.lists(any_text, max_size=8))
def test_documents_equal_their_encodings_after_end_of_text(
    encoder: DocumentEncoder, gpt2: tiktoken.Encoding, texts: list[str]
) -> None:
    assert_reference(encoder, gpt2, texts)


@settings(max_examples=30)
@given(texts=st.lists(any_text, max_size=8))
def test_fallback_gives_the_same_tokens(
    reference: DocumentEncoder, gpt2: tiktoken.Encoding, texts: list[str]
) -> None:
    assert_reference(reference, gpt2, texts)


def test_every_unicode_character_has_tiktokens_tokens(
    encoder: DocumentEncoder, gpt2: tiktoken.Encoding
) -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    planes = ["".join(characters[at : at + 997]) for at in range(0, len(characters), 997)]
    spaced = ["a ".join(plane[:200]) for plane in planes[::7]]
    assert_reference(encoder, gpt2, planes + spaced)


@pytest.mark.parametrize("character", (" ", "\n", "a", "é", "😀", "0", "'s", "\x00"))
def test_megabyte_of_one_character_has_tiktokens_tokens(
    encoder: DocumentEncoder, gpt2: tiktoken.Encoding, character: str
) -> None:
    assert_reference(encoder, gpt2, ["before", character * (1_000_000 // len(character)), "after"])


def test_text_that_looks_like_a_special_token_is_ordinary_text(
    encoder: DocumentEncoder, gpt2: tiktoken.Encoding
) -> None:
    assert_reference(encoder, gpt2, ["a<|endoftext|>b", "<|endoftext|>", "<|endoftext", ""])


def test_half_a_surrogate_pair_is_replaced_as_tiktoken_does(
    encoder: DocumentEncoder, gpt2: tiktoken.Encoding
) -> None:
    assert_reference(encoder, gpt2, ["a\ud800b", "fine", "\ud83d\ude00"])


def test_slices_in_several_threads_have_tiktokens_tokens(
    encoder: DocumentEncoder, gpt2: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A new encoder now and then, while other threads use the one before.
    monkeypatch.setattr(module, "_MAX_BYTES_PER_ENCODER", 100_000)
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text("utf-8", "replace") for path in paths]
    column = pa.array(texts, pa.large_string())
    slices = [column[at : at + 10] for at in range(0, len(texts), 10)]
    with ThreadPoolExecutor(4) as threads:
        encoded = list(threads.map(encoder.encode, slices))
    expected = [token for text in texts for token in (END_OF_TEXT, *gpt2.encode_ordinary(text))]
    assert np.concatenate([tokens for tokens, _ in encoded]).tolist() == expected
