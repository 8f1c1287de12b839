"""Text from generated tokens, piece by piece."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.inference.text import Sampling, generate_texts, stream_texts, truncation_note
from app.model.gpt import GPT, GPTConfig
from tests.model.generation import generate

TOKENIZER = Tokenizer()
DEFAULTS = Sampling("", num_samples=2, max_tokens=200, temperature=0.8, top_k=50, seed=0)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(context_length=48, num_layers=1, embd_size=16, num_heads=2))
    for parameter in gpt.parameters():
        parameter.data *= 20
    return gpt


@given(st.text())
def test_character_is_yielded_with_its_last_byte(text: str) -> None:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    decode = TOKENIZER.stream_decoder()
    tokens = TOKENIZER.encode(text).tolist()
    pieces = [decode(token) for token in tokens]
    assert "".join(pieces) == text
    for end in range(len(pieces)):
        assert text.startswith("".join(pieces[:end]))


@given(st.lists(st.integers(0, END_OF_TEXT - 1)))
def test_pieces_are_the_decoded_text_up_to_its_last_whole_character(tokens: list[int]) -> None:
    decode = TOKENIZER.stream_decoder()
    text = "".join(map(decode, tokens))
    whole = TOKENIZER.decode(tokens)
    assert whole.startswith(text)
    assert whole[len(text) :] in ("", "\ufffd")


def test_texts_are_the_generated_tokens_up_to_the_documents_end(model: GPT) -> None:
    sampling = replace(DEFAULTS, prompt="Ça va", num_samples=3, max_tokens=40, seed=8)
    prompt = torch.tensor([[END_OF_TEXT, *TOKENIZER.encode("Ça va").tolist()]] * 3)
    rows = generate(model, prompt, 40, temperature=0.8, top_k=50, seed=8)[:, 1:].tolist()
    for text, tokens in zip(generate_texts(model, TOKENIZER, sampling), rows, strict=True):
        end = tokens.index(END_OF_TEXT) if END_OF_TEXT in tokens else len(tokens)
        assert text.rstrip("\ufffd") == TOKENIZER.decode(tokens[:end]).rstrip("\ufffd")


def test_stream_stops_when_all_documents_have_ended(model: GPT) -> None:
    torch.manual_seed(0)
    ending = GPT(model.config)
    # One token in seven ends the document.
    for parameter in ending.parameters():
        parameter.data.zero_()
    ending.transformer.ln_f.bias.data[0] = 1.0
    ending.transformer.wte.weight.data[END_OF_TEXT, 0] = 9.0
    sampling = Sampling("", num_samples=4, max_tokens=10_000, temperature=1, top_k=0, seed=3)
    steps = list(stream_texts(ending, TOKENIZER, sampling))
    assert 1 < len(steps) < 100
    for row in zip(*steps, strict=True):
        is_open = [piece is not None for piece in row]
        assert is_open == sorted(is_open, reverse=True)
    assert any(piece is not None for piece in steps[-1])


def test_note_is_only_on_a_prompt_longer_than_the_context(model: GPT) -> None:
    # The token that begins the document counts as well.
    assert truncation_note(model, TOKENIZER, " a" * 47) is None
    note = truncation_note(model, TOKENIZER, " a" * 48)
    assert note == (
        "the first 1 of the prompt's 49 tokens are cut off: the model sees the last 48 of them"
    )


def test_generation_is_stopped_by_what_check_stop_raises(model: GPT) -> None:
    calls = 0

    def check_stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generate_texts(model, TOKENIZER, DEFAULTS, check_stop)
    assert calls == 4


@pytest.mark.parametrize("temperature", (0, 0.8))
def test_a_prompt_that_begins_with_the_mark_is_continued_as_one_without(
    model: GPT, temperature: float
) -> None:
    plain = replace(DEFAULTS, prompt="Once", max_tokens=20, temperature=temperature)
    marked = replace(plain, prompt="<|endoftext|>Once")
    texts = generate_texts(model, TOKENIZER, plain)
    assert generate_texts(model, TOKENIZER, marked) == [f"<|endoftext|>{text}" for text in texts]


def test_a_prompt_of_two_documents_is_continued_in_the_second(model: GPT) -> None:
    sampling = replace(DEFAULTS, prompt="One<|endoftext|>Two", num_samples=1, temperature=0)
    prompt = torch.tensor([[END_OF_TEXT, 3198, END_OF_TEXT, 7571]])
    tokens = generate(model, prompt, 20, temperature=0)[0, 4:].tolist()
    (text,) = generate_texts(model, TOKENIZER, replace(sampling, max_tokens=20))
    assert text.rstrip("\ufffd") == f"One<|endoftext|>Two{TOKENIZER.decode(tokens)}".rstrip(
        "\ufffd"
    )
