"""The results of evaluate, computed again by other means."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from app.data.tokenizer import END_OF_TEXT, token_byte_lengths, vocabulary_files
from app.errors import ExitCode
from app.files import AppendOnlyFile
from app.locks import locked
from app.model.architectures import build_config, build_model
from app.runs.checkpoint import open_checkpoint
from app.settings.tools import EvaluateSettings
from app.tools.evaluate import PUBLISHED_TOKENS, standard_error, summarize
from tests.newcomer import moved_in, type_in
from tests.tools.small_run import CONTEXT_LENGTH, RUN


@pytest.fixture(autouse=True)
def newcomer(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with moved_in(small_run, tmp_path, monkeypatch):
        yield


def evaluations() -> list[dict[str, Any]]:
    lines = (RUN / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def stream(pattern: str) -> list[int]:
    """Return the tokens of all shards, read without the program."""
    return [
        int(token)
        for path in sorted(Path("data/words").glob(pattern))
        for token in np.fromfile(path, "<u2", offset=1024)
    ]


@torch.no_grad()
def losses_of(step: int, tokens: list[int], sequences: int) -> list[float]:
    """Return the mean loss of each sequence, in float64, one at a time."""
    checkpoint = open_checkpoint(RUN / "checkpoints" / f"step-{step:06}")
    model = build_model(build_config(checkpoint.state.model))
    checkpoint.load_model(model)
    model.double()
    losses = []
    for start in range(0, sequences * CONTEXT_LENGTH, CONTEXT_LENGTH):
        sequence = torch.tensor(tokens[start : start + CONTEXT_LENGTH + 1])
        logits = model(sequence[None, :-1])
        losses.append(F.cross_entropy(logits[0], sequence[1:]).item())
    return losses


def text_of_tokens() -> dict[int, str]:
    """Return GPT-2's published vocabulary, which has a character per byte."""
    files = vocabulary_files()
    assert files
    vocabulary = json.loads(files[1].read_bytes())
    return {token: text for text, token in vocabulary.items()}


def text_bytes(tokens: list[int]) -> int:
    texts = text_of_tokens()
    return sum(len(texts[token]) for token in tokens if token != END_OF_TEXT)


@pytest.mark.parametrize(
    ("command", "step", "pattern", "sequences"),
    (
        ("evaluate", 20, "*_val_*.bin", 31),
        ("evaluate --step 10 --tokens 1000", 10, "*_val_*.bin", 15),
        ("evaluate --split train --tokens 6k", 20, "stdlib_0*.bin", 93),
    ),
)
def test_results_are_those_of_every_sequence(
    command: str,
    step: int,
    pattern: str,
    sequences: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert type_in(command, monkeypatch) == ExitCode.DONE
    tokens = stream(pattern)
    losses = losses_of(step, tokens, sequences)
    targets = tokens[1 : sequences * CONTEXT_LENGTH + 1]
    (result,) = evaluations()
    assert (result["step"], result["windows"], result["tokens"]) == (step, sequences, len(targets))
    assert result["bytes"] == text_bytes(targets)
    mean = sum(losses) / sequences
    assert result["loss"] == pytest.approx(mean, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    bits = sum(losses) * CONTEXT_LENGTH / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"], rel=1e-6)
    low, high = result["perplexity_interval"]
    assert low < result["perplexity"] < high
    assert math.log(high / low) == pytest.approx(2 * 1.96 * result["standard_error"], rel=1e-3)
    output = capsys.readouterr().out
    assert f"loss           {mean:.4f} ± {result['standard_error']:.4f} (standard error)" in output
    assert f"{len(targets):,} tokens, {result['bytes']:,} bytes, in {sequences} sequences" in output


def test_loss_is_that_measured_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("evaluate", monkeypatch) == ExitCode.DONE
    state = open_checkpoint(RUN / "checkpoints" / "step-000020").state
    assert (evaluations()[0]["loss"], evaluations()[0]["tokens"]) == (
        state.val_loss,
        state.val_tokens,
    )


def test_each_evaluation_adds_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 20):
        assert type_in(f"evaluate --step {step}", monkeypatch) == ExitCode.DONE
    assert [result["step"] for result in evaluations()] == [10, 20, 20]
    first, second = ({**result, "time": ""} for result in evaluations()[1:])
    assert first == second


def test_evaluations_at_once_keep_all_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    path = RUN / "evaluations.jsonl"
    with ExitStack() as other:
        other.enter_context(locked(path, "evaluate", file=RUN / ".evaluations.lock"))
        line = AppendOnlyFile(path)

        def append() -> None:
            line.append(b'{"step": 5}\n')
            other.close()

        # About when the one below waits for it.
        Timer(1.0, append).start()
        assert type_in("evaluate", monkeypatch) == ExitCode.DONE
    assert [line["step"] for line in evaluations()] == [5, 20]


def test_held_out_text_of_another_dataset_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in("evaluate", monkeypatch) == ExitCode.DONE
    assert type_in("prepare --val-tokens 3000 --out-dir other", monkeypatch) == ExitCode.DONE
    assert capsys.readouterr().err == ""
    assert type_in("evaluate --dataset-dir other", monkeypatch) == ExitCode.DONE
    warning = capsys.readouterr().err
    assert warning.startswith("warning: data/runs/small was not trained on data/other")
    assert [result["trained_on_this_dataset"] for result in evaluations()] == [True, False]


def test_loss_that_diverged_has_a_perplexity() -> None:
    result = summarize(np.array([800.0, 900.0]), CONTEXT_LENGTH, num_bytes=0)
    assert math.isfinite(result.perplexity)


def test_one_sequence_has_no_error_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in(f"evaluate --tokens {CONTEXT_LENGTH}", monkeypatch) == ExitCode.DONE
    (result,) = evaluations()
    assert result["standard_error"] is result["perplexity_interval"] is None
    assert "±" not in capsys.readouterr().out


def test_tokens_without_text_have_no_bits_per_byte() -> None:
    result = summarize(np.array([1.0, 2.0]), 8, 0)
    assert (result.loss, result.bits_per_byte) == (1.5, None)


def test_bytes_of_tokens_are_those_of_the_vocabulary() -> None:
    table, texts = token_byte_lengths(), text_of_tokens()
    assert table.shape == (END_OF_TEXT + 1,)
    assert table[END_OF_TEXT] == 0
    assert table[:END_OF_TEXT].tolist() == [len(texts[i]) for i in range(END_OF_TEXT)]


def test_published_results_are_on_10240_sequences_of_1024() -> None:
    assert PUBLISHED_TOKENS == 10_240 * 1024
    assert EvaluateSettings(tokens="published").tokens == "published"


def autoregressive(memory: float, runs: int, sequences: int) -> np.ndarray[Any, Any]:
    """Return losses that resemble the one before, [runs, sequences], with mean 0."""
    noise = np.random.default_rng(0).standard_normal((runs, sequences))
    values = noise / math.sqrt(1 - memory**2)
    for i in range(1, sequences):
        values[:, i] = memory * values[:, i - 1] + noise[:, i]
    return values


@pytest.mark.parametrize("memory", (0.0, 0.6))
def test_confidence_interval_contains_the_true_loss_in_95_percent(memory: float) -> None:
    values = autoregressive(memory, runs=2000, sequences=1024)
    errors = np.array([standard_error(one) for one in values])
    within = np.abs(values.mean(axis=1)) < 1.96 * errors
    assert 0.90 < within.mean() < 0.97
    if memory:
        independent = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
        too_sure = np.abs(values.mean(axis=1)) < 1.96 * independent
        assert too_sure.mean() < 0.75


def test_few_sequences_count_as_independent() -> None:
    losses = np.array([3.0, 5.0, 4.0])
    assert standard_error(losses) == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("val_tokens", "problem"), ((CONTEXT_LENGTH - 1, f"has {CONTEXT_LENGTH}"), (0, "has 0"))
)
def test_held_out_text_shorter_than_a_sequence_is_an_error_with_the_number_that_would_do(
    val_tokens: int,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = f"prepare --total-tokens 3000 --val-tokens {val_tokens} --out-dir short"
    assert type_in(line, monkeypatch) == ExitCode.DONE
    capsys.readouterr()
    assert type_in("evaluate --dataset-dir short", monkeypatch) == ExitCode.USER
    assert capsys.readouterr().err == (
        f"error: data/short {problem} held-out tokens, and a sequence needs {CONTEXT_LENGTH + 1} "
        "(MODEL_CONTEXT_LENGTH and one more)\n"
        "  fix: prepare it again, into another folder, with PREPARE_VAL_TOKENS="
        f"{CONTEXT_LENGTH} or more; or set EVALUATE_SPLIT=train\n"
    )
    assert not (RUN / "evaluations.jsonl").exists()
    assert type_in("evaluate --dataset-dir short --split train", monkeypatch) == ExitCode.DONE


def test_shards_of_another_program_are_held_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as prepare's, so the same loss."""
    assert type_in("evaluate", monkeypatch) == ExitCode.DONE
    theirs = Path("data/theirs")
    theirs.mkdir()
    for number, path in enumerate(sorted(Path("data/words").glob("*_val_*.bin"))):
        shutil.copy(path, theirs / f"Validation{number}.BIN")
    assert type_in("evaluate --dataset-dir theirs", monkeypatch) == ExitCode.DONE
    own, other = evaluations()
    assert (own["loss"], own["tokens"]) == (other["loss"], other["tokens"])


def test_the_runs_own_dataset_is_measured_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings of another dataset, as when a recipe is left out."""
    monkeypatch.setenv("PREPARE_OUT_DIR", "other")
    assert type_in("evaluate", monkeypatch) == ExitCode.DONE
    assert "on val tokens of data/words:" in capsys.readouterr().out
    assert type_in("evaluate --dataset-dir other", monkeypatch) == ExitCode.USER
    assert type_in("export", monkeypatch) == ExitCode.DONE
    assert "stdlib (files " in (RUN / "export" / "README.md").read_text(encoding="utf-8")
    (RUN / "settings.json").unlink()
    assert type_in("evaluate", monkeypatch) == ExitCode.USER
    assert "no dataset in data/other" in capsys.readouterr().err


def test_as_many_tokens_are_measured_as_in_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bits, in batches of another size than would fit."""
    line = "train --run-name part --max-steps 2 --warmup-steps 0 --val-tokens 700"
    assert type_in(f"{line} --micro-batch-size 2", monkeypatch) == ExitCode.DONE
    state = open_checkpoint(Path("data/runs/part/checkpoints/step-000002")).state
    assert f"val_loss:{state.val_loss:.4f} (on 640 tokens)\n" in capsys.readouterr().out
    assert type_in("evaluate --run-name part", monkeypatch) == ExitCode.DONE
    assert "measured on    640 tokens" in (output := capsys.readouterr().out)
    assert "; the split has 2,001, --tokens all takes them" in output
    (line,) = Path("data/runs/part/evaluations.jsonl").read_text().splitlines()
    assert (json.loads(line)["loss"], json.loads(line)["tokens"]) == (state.val_loss, 640)
    assert type_in("evaluate --run-name part --tokens all", monkeypatch) == ExitCode.DONE
    assert "measured on    1,984 tokens" in capsys.readouterr().out
