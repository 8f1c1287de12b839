"""HellaSwag's score: which ending is the likeliest, however the questions are divided and cut."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.data.hellaswag import Question, read_questions
from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.hardware.device import Device
from app.inference.hellaswag import HellaSwag, encode
from app.model.gpt import GPT, GPTConfig
from app.model.language_model import LanguageModel
from app.model.qwen3 import Qwen3, Qwen3Config
from tests.inference.hellaswag_questions import FILE, mixed_questions, write_questions

LENGTH = 32
M = TypeVar("M", bound=LanguageModel)
CPU = Device(torch.device("cpu"), "cpu", "float32", deterministic=True, peak_flops=None)


@pytest.fixture(scope="module")
def model() -> GPT:
    return far_from_uniform(GPT(GPTConfig(LENGTH, num_layers=2, embd_size=16, num_heads=2)))


def qwen3() -> LanguageModel:
    config = Qwen3Config(LENGTH, num_layers=2, embd_size=16, num_heads=2, head_dim=8)
    return far_from_uniform(Qwen3(config))


def far_from_uniform(model: M) -> M:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        # Far from uniform, so that the endings differ by more than their lengths.
        parameter.data *= 20
    return model


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    path = tmp_path_factory.mktemp("hellaswag") / "mixed.jsonl"
    return read_questions(write_questions(path, mixed_questions()))


def cleaned(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


@torch.no_grad()
def slow_scores(model: LanguageModel, question: Question) -> tuple[list[float], list[float]]:
    """The scores of each ending, alone and unpadded, with log-softmax over all positions."""
    encode = Tokenizer().encode
    both = question.ctx_a + " " + question.ctx_b.capitalize()
    query = cleaned(question.activity_label + ": " + both)
    per_character, sums = [], []
    for ending in map(cleaned, question.endings):
        tokens = encode(f"{query} {ending}").astype(int).tolist()
        count = len(tokens) - len(encode(query.rstrip()))
        tokens = tokens[-(LENGTH + 1) :]
        count = min(count, len(tokens) - 1)
        log_odds = F.log_softmax(model(torch.tensor([tokens[:-1]]))[0], dim=-1)
        places = range(len(tokens) - 1 - count, len(tokens) - 1)
        sums.append(sum(float(log_odds[i, tokens[i + 1]]) for i in places))
        per_character.append(sums[-1] / len(ending) if ending else float("-inf"))
    return per_character, sums


def total(batches: Iterator[Tensor]) -> list[int]:
    return sum(batches, torch.zeros(2, dtype=torch.int64)).tolist()


def scored(model: LanguageModel, questions: list[Question], max_tokens: int) -> list[int]:
    return total(HellaSwag(questions, LENGTH, max_tokens).correct(model, CPU))


@pytest.mark.parametrize("architecture", ("gpt2", "qwen3"))
def test_the_likeliest_ending_is_that_of_each_ending_alone(
    model: GPT, questions: list[Question], architecture: str
) -> None:
    tried = qwen3() if architecture == "qwen3" else model
    questions = questions[::3]
    expected_total, differ = torch.zeros(2, dtype=torch.int64), 0
    for question in questions:
        best = [scores.index(max(scores)) for scores in slow_scores(tried, question)]
        for label in range(4):
            right = [int(label == index) for index in best]
            assert scored(tried, [replace(question, label=label)], 64) == right
        differ += best[0] != best[1]
        expected_total += torch.tensor([int(question.label == index) for index in best])
    assert differ > len(questions) // 8
    assert scored(tried, questions, 1024) == expected_total.tolist()


@pytest.mark.parametrize("max_tokens", (1, 100_000))
@pytest.mark.parametrize("world_size", (1, 2, 5, 20))
def test_ranks_and_batches_change_nothing(
    model: GPT, questions: list[Question], max_tokens: int, world_size: int
) -> None:
    some = questions[::5]
    counts = [
        total(HellaSwag(some, LENGTH, max_tokens, rank, world_size).correct(model, CPU))
        for rank in range(world_size)
    ]
    assert torch.tensor(counts).sum(dim=0).tolist() == scored(model, some, 1024)


def test_the_longest_come_first_and_as_many_as_fit(model: GPT, questions: list[Question]) -> None:
    shapes: list[tuple[int, ...]] = []

    def note(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.append(inputs[0].shape)

    hook = model.transformer.wte.register_forward_pre_hook(note)
    list(HellaSwag(questions, LENGTH, 512).correct(model, CPU))
    hook.remove()
    assert all(rows * width <= 512 for rows, width in shapes)
    assert shapes == sorted(shapes, key=lambda shape: -shape[1])
    assert sum(rows for rows, _ in shapes) == 4 * len(questions)


def test_bf16_gives_nearly_the_same(model: GPT, questions: list[Question]) -> None:
    batches = HellaSwag(questions, LENGTH, 1024).correct(model, replace(CPU, precision="bf16"))
    differences = torch.tensor(total(batches)) - torch.tensor(scored(model, questions, 1024))
    assert differences.abs().max() <= 3


def test_endings_of_the_same_likelihood_go_to_the_first(model: GPT) -> None:
    (question,) = [each for each in read_questions(FILE) if each.activity_label == "x"]
    alike = replace(question, endings=["c"] * 4)
    assert [scored(model, [replace(alike, label=i)], 64) for i in (0, 1)] == [[1, 1], [0, 0]]


def test_an_ending_without_a_character_is_never_the_likeliest_per_character(model: GPT) -> None:
    question = replace(read_questions(FILE)[0], endings=["[a]", "b", "c", "d"], label=0)
    assert scored(model, [question], 64)[0] == 0


def test_a_text_without_a_beginning_begins_like_a_document() -> None:
    question = Question("[x", "a", "b]", ["c d", "e", "f", "g"], 0)
    tokens, count = encode(question, Tokenizer(), LENGTH)[0]
    assert tokens.tolist() == [END_OF_TEXT, *Tokenizer().encode(" c d").tolist()]
    assert count == 2


def test_what_check_stop_raises_ends_the_measurement_before_the_next_batch(
    model: GPT, questions: list[Question]
) -> None:
    calls: list[None] = []

    def check_stop() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise InterruptedError

    batches = HellaSwag(questions, LENGTH, 1).correct(model, CPU, check_stop)
    assert [int(counts.max()) <= 1 for counts in (next(batches), next(batches))] == [True, True]
    with pytest.raises(InterruptedError):
        next(batches)
