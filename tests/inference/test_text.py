"""From the tokens that a model draws to text, piece by piece."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.inference.text import generate_texts, stream_texts, truncation_note
from app.model.generate import generate
from app.model.gpt import GPT, GPTConfig
from app.settings.groups import SampleSettings

TOKENIZER = Tokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(context_length=48, num_layers=1, embd_size=16, num_heads=2))
    for parameter in gpt.parameters():
        parameter.data *= 20
    return gpt


@given(st.text())
def test_a_character_comes_with_its_last_byte(text: str) -> None:
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


def test_texts_are_what_generate_draws_up_to_the_documents_end(model: GPT) -> None:
    chosen = SampleSettings(prompt="Ça va", num_samples=3, max_tokens=40, seed=8)
    prompt = torch.tensor([[END_OF_TEXT, *TOKENIZER.encode("Ça va").tolist()]] * 3)
    rows = generate(model, prompt, 40, temperature=0.8, top_k=50, seed=8)[:, 1:].tolist()
    for text, tokens in zip(generate_texts(model, TOKENIZER, chosen), rows, strict=True):
        end = tokens.index(END_OF_TEXT) if END_OF_TEXT in tokens else len(tokens)
        assert text.rstrip("\ufffd") == TOKENIZER.decode(tokens[:end]).rstrip("\ufffd")


def test_it_is_over_when_all_documents_have_ended(model: GPT) -> None:
    torch.manual_seed(0)
    ending = GPT(model.config)
    # One in seven draws ends the document.
    for parameter in ending.parameters():
        parameter.data.zero_()
    ending.transformer.ln_f.bias.data[0] = 1.0
    ending.transformer.wte.weight.data[END_OF_TEXT, 0] = 9.0
    chosen = SampleSettings(num_samples=4, max_tokens=10_000, temperature=1, top_k=0, seed=3)
    steps = list(stream_texts(ending, TOKENIZER, chosen))
    assert 1 < len(steps) < 100
    for row in zip(*steps, strict=True):
        lives = [piece is not None for piece in row]
        assert lives == sorted(lives, reverse=True)
    assert any(piece is not None for piece in steps[-1])


def test_only_a_prompt_longer_than_the_context_is_told(model: GPT) -> None:
    # The document's beginning is a token, too.
    assert truncation_note(model, TOKENIZER, " a" * 47) is None
    told = truncation_note(model, TOKENIZER, " a" * 48)
    assert told == "the prompt has 49 tokens; the model sees the last 48 of them"
