"""The real lm-eval on an exported model, without a network: it agrees with evaluate."""

import argparse
import inspect
import json
import math
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from app.data.hellaswag import Question, read_questions
from app.data.tokenizer import Tokenizer
from app.errors import ExitCode
from app.inference.hellaswag import HellaSwag
from app.model.language_model import LanguageModel
from app.runs.checkpoints import latest_checkpoint
from app.runs.load import load_model
from app.runs.metrics import read_metrics
from tests.conftest import Say
from tests.inference.hellaswag_questions import mixed_questions, write_questions
from tests.inference.test_hellaswag import CPU
from tests.newcomer import REPOSITORY, settle, type_in
from tests.tools.small_run import CONTEXT_LENGTH, RUN, SETTINGS

pytestmark = pytest.mark.lm_eval

LM_EVAL = REPOSITORY / ".venv-lm-eval" / "bin" / "lm_eval"
WINDOWS = 40
QUESTIONS = (
    {"query": "import argparse\nimport os\nimport", "choices": [" sys", " cheese", " the"]},
    {"query": "class Parser:\n    def __init__(", "choices": ["self", "banana", "):"]},
    {"query": "    if value is None:\n        return", "choices": [" None", " elephants"]},
)
PERPLEXITY = {
    "task": "own_text",
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
CHOICE = {
    "task": "own_questions",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


def text_of_windows(module: ModuleType) -> str:
    """Python source of exactly WINDOWS windows' tokens.

    lm-eval cuts a document into windows as `evaluate` does a stream: the first predicts its tokens
    from <|endoftext|> on, each further one from the token before it. Only a last window that is not
    full would be another: lm-eval gives it more context, `evaluate` leaves it out.
    """
    tokenizer, count = Tokenizer(), WINDOWS * CONTEXT_LENGTH
    lines = inspect.getsource(module).splitlines(keepends=True)
    for first in range(len(lines)):
        tokens = tokenizer.encode("".join(lines[first:]))[:count].tolist()
        text = tokenizer.decode(tokens)
        # A word that is cut off may have other tokens.
        if tokenizer.encode(text).tolist() == tokens:
            return text
    raise AssertionError("no part of it is cut at a token's end")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_task(task: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    name, folder = task["task"], Path("tasks")
    folder.mkdir(exist_ok=True)
    write_rows(folder / f"{name}.jsonl", rows)
    files = {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}}
    content = yaml.safe_dump({**task, "dataset_kwargs": files})
    (folder / f"{name}.yaml").write_text(content, encoding="utf-8")


def write_hellaswag(name: str, path: Path) -> None:
    """Write lm-eval's own task under another name, on the questions in a file."""
    (folder,) = LM_EVAL.parents[1].glob("lib/python*/site-packages/lm_eval/tasks/hellaswag")
    content = (folder / "hellaswag.yaml").read_text("utf-8")
    for line, changed in (
        ("task: hellaswag", f"task: {name}"),
        ("dataset_path: Rowan/hellaswag", "dataset_path: json"),
        ("training_split: train", "training_split: null"),
    ):
        assert content.count(f"{line}\n") == 1
        content = content.replace(f"{line}\n", f"{changed}\n")
    files = {"data_files": {"validation": str(path.resolve())}}
    content += yaml.safe_dump({"dataset_kwargs": files})
    Path("tasks", f"{name}.yaml").write_text(content, encoding="utf-8")
    shutil.copy(folder / "utils.py", "tasks")


def lm_eval(tasks: str) -> dict[str, dict[str, Any]]:
    """Results by task."""
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    command = [
        *(str(LM_EVAL), "--model", "hf", "--device", "cpu", "--batch_size", "8"),
        *("--model_args", f"pretrained={RUN / 'export'}"),
        *("--include_path", "tasks", "--tasks", tasks),
        *("--output_path", "results.json"),
    ]
    ended = subprocess.run(
        command,
        env={
            **os.environ,
            **unreachable,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(Path("cache").resolve()),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    (written,) = Path().glob("results*.json")
    results: dict[str, dict[str, Any]] = json.loads(written.read_bytes())["results"]
    return results


def choice(model: LanguageModel, question: Question) -> int:
    """Return the ending that HellaSwag takes for the likeliest per character."""
    for label in range(4):
        scored = HellaSwag([replace(question, label=label)], CONTEXT_LENGTH, 1)
        if next(scored.correct(model, CPU))[0]:
            return label
    raise AssertionError("it takes none")


@pytest.mark.parametrize("architecture", ("gpt2", "qwen3"))
def test_lm_eval_hellaswag_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say, architecture: str
) -> None:
    assert LM_EVAL.exists(), "make test-lm-eval makes its environment"
    settle(tmp_path, monkeypatch)
    # lm-eval reads a column of one type.
    questions = [{**each, "label": int(each["label"])} for each in mixed_questions()]
    # It cuts beginnings, but refuses endings that are longer than the context.
    long = [
        e for q in questions for e in q["endings"] if Tokenizer().encode(e).size >= CONTEXT_LENGTH
    ]
    assert not long
    path = write_questions(Path("questions.jsonl"), questions)
    Path(".env").write_text(f"{SETTINGS}MODEL_ARCHITECTURE={architecture}\n", encoding="utf-8")
    scored = f"train --hellaswag-every 10 --hellaswag-file {path.resolve()}"
    for command in ("prepare", scored, "export"):
        assert type_in(command, monkeypatch) == ExitCode.DONE
    *_, before, last = [row for row in read_metrics(RUN / "metrics.jsonl") if row.hellaswag]
    assert (before.step, last.step) == (9, 19)

    model = load_model(latest_checkpoint(RUN), CPU)
    chosen = [
        {**row, "label": choice(model, question)}
        for row, question in zip(questions, read_questions(path), strict=True)
    ]
    Path("tasks").mkdir()
    write_hellaswag("as_labeled", path)
    write_hellaswag("as_chosen", write_questions(Path("chosen.jsonl"), chosen))
    results = lm_eval("as_labeled,as_chosen")
    theirs = [results["as_labeled"][f"{metric},none"] for metric in ("acc_norm", "acc")]
    say(f"acc_norm, acc: lm-eval {theirs}, train {last.hellaswag}")
    counts = HellaSwag(read_questions(path), CONTEXT_LENGTH, 256).correct(model, CPU)
    assert [count / len(questions) for count in sum(counts, torch.zeros(2)).tolist()] == theirs
    assert last.hellaswag == theirs[0]
    # lm-eval chooses the same ending of every question.
    assert results["as_chosen"]["acc_norm,none"] == 1
    assert results["as_chosen"]["acc,none"] < 1


@pytest.mark.parametrize("architecture", ("gpt2", "qwen3"))
def test_lm_eval_loss_is_that_of_evaluate(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    assert LM_EVAL.exists(), "make test-lm-eval makes its environment"
    settle(tmp_path, monkeypatch)
    text = text_of_windows(argparse)
    # Held-out text comes first: it is the first document, and nothing else.
    documents = [text, *(inspect.getsource(module) for module in (shutil, tarfile))]
    write_rows(Path("documents.jsonl"), [{"text": document} for document in documents])
    settings = SETTINGS.replace("DATASET=stdlib", "DATASET=documents.jsonl")
    settings += f"MODEL_ARCHITECTURE={architecture}\n"
    Path(".env").write_text(settings, encoding="utf-8")
    held_out = WINDOWS * CONTEXT_LENGTH
    assert type_in(f"prepare --val-tokens {held_out}", monkeypatch) == ExitCode.DONE
    for command in ("train", "evaluate", "export"):
        assert type_in(command, monkeypatch) == ExitCode.DONE
    ours = json.loads((RUN / "evaluations.jsonl").read_bytes())
    assert (ours["windows"], ours["bytes"]) == (WINDOWS, len(text.encode()))

    write_task(PERPLEXITY, [{"text": text}])
    write_task(CHOICE, list(QUESTIONS))
    results = lm_eval("own_text,own_questions")
    theirs = results["own_text"]["bits_per_byte,none"]
    say(f"bits per byte: lm-eval {theirs:.7f}, evaluate {ours['bits_per_byte']:.7f}")
    assert theirs == pytest.approx(ours["bits_per_byte"], rel=1e-5)
    loss = theirs * math.log(2) * len(text.encode()) / held_out
    assert loss == pytest.approx(ours["loss"], rel=1e-5)
    assert 0 <= results["own_questions"]["acc,none"] <= 1


NAMES = """
import json
import sys

import gguf
from safetensors import safe_open

names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3]
shapes = {}
with safe_open(sys.argv[1], "pt") as weights:
    for name in weights.keys():
        kind, its_name = names.get_type_and_name(name, (".weight",))
        assert kind in known, name
        shapes[its_name] = weights.get_slice(name).get_shape()
print(json.dumps(shapes))
"""


@pytest.mark.parametrize("tied", ("true", "false"))
def test_a_qwen3_has_the_tensors_that_llama_cpp_reads(
    tied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    settings = f"MODEL_ARCHITECTURE=qwen3\nMODEL_HEAD_DIM=16\nMODEL_TIE_EMBEDDINGS={tied}\n"
    Path(".env").write_text(SETTINGS + settings, encoding="utf-8")
    for command in ("prepare", "train --max-steps 2", "export"):
        assert type_in(command, monkeypatch) == ExitCode.DONE
    ended = subprocess.run(
        [str(LM_EVAL.with_name("python")), "-c", NAMES, str(RUN / "export/model.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    width, heads, hidden = 32, 4 * 16, 128
    expected = {"token_embd.weight": [50257, width], "output_norm.weight": [width]}
    # Without it, llama.cpp takes the embedding for the output layer.
    expected |= {} if tied == "true" else {"output.weight": [50257, width]}
    for layer in range(3):
        expected |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": [width],
                "attn_q": [heads, width],
                "attn_k": [heads, width],
                "attn_v": [heads, width],
                "attn_q_norm": [16],
                "attn_k_norm": [16],
                "attn_output": [width, heads],
                "ffn_norm": [width],
                "ffn_gate": [hidden, width],
                "ffn_up": [hidden, width],
                "ffn_down": [width, hidden],
            }.items()
        }
    assert json.loads(ended.stdout) == expected
