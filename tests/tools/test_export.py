"""Folders that export writes, looked at as their users do."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2LMHeadModel,
    Qwen3ForCausalLM,
)

from app.data.tokenizer import Tokenizer
from app.errors import ExitCode
from app.model.architectures import build_config, build_model
from app.model.language_model import LanguageModel
from app.runs.checkpoint import open_checkpoint
from app.tools.export import FILES
from app.tools.export.reference import transformers_logits
from tests.model.generation import generate
from tests.newcomer import REPOSITORY, moved_in, run_really, type_in
from tests.python_process import run_python
from tests.tools.small_run import CONTEXT_LENGTH, RUN
from tests.train.code_clone import Clone

EXPORT = RUN / "export"
RELU2 = '"gelu": lambda x: F.relu(x).square()'


@pytest.fixture(autouse=True)
def newcomer(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with moved_in(small_run, tmp_path, monkeypatch):
        yield


def ours(step: int, run: Path = RUN) -> LanguageModel:
    checkpoint = open_checkpoint(run / "checkpoints" / f"step-{step:06}")
    model = build_model(build_config(checkpoint.state.model))
    checkpoint.load_model(model)
    return model


def read(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_bytes())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@torch.no_grad()
def test_transformers_computes_the_same_logits_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export", monkeypatch) == ExitCode.DONE
    theirs, info = AutoModelForCausalLM.from_pretrained(EXPORT, output_loading_info=True)
    assert isinstance(theirs, GPT2LMHeadModel)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(EXPORT)
    prompt = tokenizer("<|endoftext|>import os\n\nclass Path:\n", return_tensors="pt")
    tokens, model = prompt["input_ids"], ours(20)
    assert model(tokens).std() > 0.5, "it has learned nothing"
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    count = CONTEXT_LENGTH - tokens.shape[1]
    theirs.generation_config.eos_token_id = None
    written = theirs.generate(**prompt, max_new_tokens=count, do_sample=False)
    assert written.tolist() == generate(model, tokens, count, temperature=0).tolist()


def test_a_qwen3_is_one_for_transformers_and_for_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = "MODEL_ARCHITECTURE=qwen3 MODEL_HEAD_DIM=16 TRAIN_RUN_NAME=qwen3"
    assert type_in(f"{chosen} train", monkeypatch) == ExitCode.DONE
    capsys.readouterr()
    # The other commands find the architecture in the checkpoint.
    for command in ("export", "sample --max-tokens 5", "evaluate", "inspect data/runs/qwen3"):
        assert type_in(f"TRAIN_RUN_NAME=qwen3 {command}", monkeypatch) == ExitCode.DONE
    run = Path("data/runs/qwen3")
    lines = capsys.readouterr().out.splitlines()
    last = run / "checkpoints" / "step-000020"
    assert lines[0] == f"{run / 'export'}: {last} as a Qwen3ForCausalLM in float32"
    (shape,) = [line for line in lines if line.startswith("  model: {")]
    assert "'architecture': 'qwen3'" in shape
    assert "'head_dim': 16, 'tie_embeddings': False" in shape
    own_loss = open_checkpoint(last).state.val_loss
    assert own_loss is not None
    assert json.loads((run / "evaluations.jsonl").read_bytes())["loss"] == pytest.approx(own_loss)

    folder = run / "export"
    assert names(folder) == set(FILES)
    config = read(folder, "config.json")
    expected = {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "intermediate_size": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 50256,
    }
    assert expected.items() <= config.items()
    assert "layer_types" not in config
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(theirs, Qwen3ForCausalLM)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Qwen's own tokenizer takes digits one by one.
    text = "<|endoftext|>import os\n\nx = 12345678 # it's   naïve\n"
    prompt = tokenizer(text, return_tensors="pt")
    tokens, model = prompt["input_ids"], ours(20, run)
    assert tokens[0].tolist() == [50256, *Tokenizer().encode(text[13:]).tolist()]
    assert model(tokens).std() > 0.5, "it has learned nothing"
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    theirs.generation_config.eos_token_id = None
    written = theirs.generate(**prompt, max_new_tokens=30, do_sample=False)
    assert written.tolist() == generate(model, tokens, 30, temperature=0).tolist()

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "tags: [qwen3]\n" in card
    assert (
        "\nA small Qwen3 with GPT-2's tokenizer, trained from scratch with gpt-compose.\n" in card
    )
    stored, multiplied = model.num_parameters(), model.num_multiplied()
    assert stored - multiplied > 50257 * 32
    assert f"| Parameters | {stored:,}, stored in float32; {multiplied:,} of them are " in card
    assert "| Shape | 3 layers, width 32, 4 heads of 16, context of 64 tokens |" in card


@torch.no_grad()
def test_checkpoint_and_folder_can_be_selected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert type_in("export --step 10 --out-dir models/early", monkeypatch) == ExitCode.DONE
    theirs = GPT2LMHeadModel.from_pretrained("data/models/early")
    tokens = torch.arange(40)[None]
    assert (theirs(tokens).logits - ours(10)(tokens)).abs().max() < 1e-4
    assert not EXPORT.exists()
    assert read(Path("data/models/early"), "export.json")["step"] == 10


def test_folder_has_the_files_that_other_programs_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export", monkeypatch) == ExitCode.DONE
    assert names(EXPORT) == set(FILES)
    assert len({path.stat().st_mode for path in EXPORT.iterdir()}) == 1
    with safe_open(EXPORT / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    config = read(EXPORT, "config.json")
    expected = {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu",
        "n_positions": CONTEXT_LENGTH,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 50257,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    assert expected.items() <= config.items()
    assert GenerationConfig.from_pretrained(EXPORT).eos_token_id == 50256


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@torch.no_grad()
def test_transformers_computes_what_export_has_checked(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type_in(f"export --dtype {dtype}", monkeypatch) == ExitCode.DONE
    stored = load_file(EXPORT / "model.safetensors")
    weights = {name: value.float() for name, value in stored.items()}
    tokens = torch.arange(CONTEXT_LENGTH)[None]
    checked = transformers_logits(read(EXPORT, "config.json"), weights, tokens)
    theirs = GPT2LMHeadModel.from_pretrained(EXPORT, dtype=torch.float32)
    assert (theirs(tokens).logits - checked).abs().max() < 2e-5 * checked.std()


@pytest.mark.slow
@pytest.mark.processes
def test_a_changed_activation_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone")
    clone.edit("app/model/gpt.py", '"gelu": F.gelu', RELU2)
    program = "import sys; from app.cli.process import run; sys.exit(run(['export']))"
    ended = run_python(program, PYTHONPATH=clone.folder)
    assert ended.returncode == ExitCode.USER
    warning, *error = ended.stderr.splitlines()
    assert warning.endswith("was trained with other code of the model: app/model/gpt.py differs")
    assert error[0].startswith(
        "error: the model that app/model computes is not a GPT2LMHeadModel: with random weights "
        "its logits differ by up to "
    )
    assert len(error) == 2
    assert not EXPORT.exists()


def test_bfloat16_halves_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export", monkeypatch) == ExitCode.DONE
    whole = (EXPORT / "model.safetensors").stat().st_size
    assert type_in("export --dtype bfloat16", monkeypatch) == ExitCode.DONE
    assert (EXPORT / "model.safetensors").stat().st_size == pytest.approx(whole / 2, rel=0.01)
    assert GPT2LMHeadModel.from_pretrained(EXPORT).dtype == torch.bfloat16


def test_model_card_names_the_origin_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export", monkeypatch) == ExitCode.DONE
    card = (EXPORT / "README.md").read_text(encoding="utf-8")
    state = open_checkpoint(RUN / "checkpoints" / "step-000020").state
    assert "\n# small\n" in card
    assert "stdlib (files " in card
    assert "20,000 tokens" in card
    assert "5,120 tokens in 20 steps" in card
    loss = f"{state.val_loss:.4f} nats per token, on {state.val_tokens:,} tokens"
    assert f"| Held-out loss | {loss} |" in card
    origin = read(EXPORT, "export.json")
    assert origin["dataset"]["fingerprint"] == state.identity["dataset_fingerprint"]


def test_model_card_of_a_branch_names_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RUN / "checkpoints" / "step-000020"
    replace(open_checkpoint(folder).state, origin="long@5").write(folder)
    assert type_in("export", monkeypatch) == ExitCode.DONE
    card = (EXPORT / "README.md").read_text(encoding="utf-8")
    assert "| Training | 5,120 tokens in 20 steps, the first of them as long@5 |" in card
    assert read(EXPORT, "export.json")["began_as"] == "long@5"


def test_missing_dataset_is_named_by_its_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree("data/words")
    assert type_in("export", monkeypatch) == ExitCode.DONE
    fingerprint = read(EXPORT, "export.json")["dataset"]["fingerprint"]
    assert fingerprint in (EXPORT / "README.md").read_text(encoding="utf-8")


def run_example(page: Path, folder: Path) -> str:
    """Run the first Python example of a page in a folder, and return what it prints."""
    program = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert program
    ended = subprocess.run(
        [sys.executable, "-c", program[1]],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_example_in_the_model_card_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export", monkeypatch) == ExitCode.DONE
    written = run_example(EXPORT / "README.md", EXPORT)
    assert written.startswith("<|endoftext|>Once upon a time")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ("", "MODEL_ARCHITECTURE=qwen3 MODEL_CONTEXT_LENGTH=16"))
def test_example_in_the_tutorial_writes_as_much_as_the_context_takes(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("train --max-steps 1", "export"):
        assert type_in(f"TRAIN_RUN_NAME=demo {chosen} {command}", monkeypatch) == ExitCode.DONE
    written = run_example(REPOSITORY / "docs" / "tutorial.md", Path())
    assert written.startswith("def ")
    generation = read(Path("data/runs/demo/export"), "generation_config.json")
    assert generation["max_length"] == (16 if chosen else CONTEXT_LENGTH)


def test_export_needs_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['tokenizers'] = None\n"
        "from app.cli.process import run; sys.exit(run(['export']))"
    )
    assert run_python(code).returncode == ExitCode.DONE
    assert names(EXPORT) == set(FILES)


def test_export_opens_the_weights_for_their_hash_and_to_load_them_once() -> None:
    code = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda event, it: event == 'open' and opened.append(str(it[0])))\n"
        "from app.cli.process import run; run(['export'])\n"
        "print(sum(name.endswith('step-000020/model.safetensors') for name in opened))"
    )
    assert run_python(code).stdout.splitlines()[-1] == "2"


def test_export_replaces_the_earlier_one_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export --step 10", monkeypatch) == ExitCode.DONE
    first = {path.name: path.read_bytes() for path in EXPORT.iterdir()}
    kept = Path("kept")
    kept.mkdir()
    for path in EXPORT.iterdir():
        os.link(path, kept / path.name)
    assert type_in("export", monkeypatch) == ExitCode.DONE
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == first
    assert read(EXPORT, "export.json")["step"] == 20
    assert names(EXPORT.parent) >= {"export", "checkpoints"}
    assert not [name for name in names(EXPORT.parent) if "partial" in name]


def test_same_checkpoint_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export", monkeypatch) == ExitCode.DONE
    assert type_in("export --out-dir again", monkeypatch) == ExitCode.DONE
    for file in FILES:
        assert (EXPORT / file).read_bytes() == Path("data/again", file).read_bytes()


def test_symbolic_link_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("disk").mkdir()
    EXPORT.symlink_to(Path("disk").resolve())
    assert type_in("export", monkeypatch) == ExitCode.DONE
    assert EXPORT.is_symlink()
    assert names(Path("disk")) == set(FILES)


def test_full_disk_leaves_the_earlier_export_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export --step 10", monkeypatch) == ExitCode.DONE
    before = {path.name: path.read_bytes() for path in EXPORT.iterdir()}
    # The weights take more than this, or nothing would be tested.
    assert len(before["model.safetensors"]) > 3_000_000
    ended = run_really("export", largest_file=3_000_000)
    assert ended.returncode == ExitCode.EXHAUSTED, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 2
    assert {path.name: path.read_bytes() for path in EXPORT.iterdir()} == before
    assert not [name for name in names(EXPORT.parent) if "partial" in name]


def test_exports_at_once_leave_one_of_them_whole() -> None:
    def start(step: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "app", "export", "--step", str(step)],
            stderr=subprocess.PIPE,
            text=True,
        )

    codes = set()
    for process in [start(step) for step in (10, 20, 10)]:
        _, error = process.communicate(timeout=300)
        codes.add(process.returncode)
        folder = EXPORT.resolve()
        refusal = f"error: another process is working on {EXPORT}\n"
        assert (process.returncode, error) == (0, "") or error.startswith(refusal), (error, folder)
    assert codes <= {ExitCode.DONE, ExitCode.USER}
    assert ExitCode.DONE in codes
    assert names(EXPORT) == set(FILES)
    step = read(EXPORT, "export.json")["step"]
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(EXPORT)(tokens).logits
        assert (logits - ours(step)(tokens)).abs().max() < 1e-4
    assert not [name for name in names(EXPORT.parent) if "partial" in name]


def test_leftovers_of_a_killed_export_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_in("export --step 10", monkeypatch) == ExitCode.DONE
    # Killed between its two renames, after a copy that was killed earlier.
    EXPORT.rename(EXPORT.with_name("export.old.partial"))
    EXPORT.with_name("export.partial").mkdir()
    assert type_in("export", monkeypatch) == ExitCode.DONE
    assert names(EXPORT) == set(FILES)
    assert not [name for name in names(EXPORT.parent) if "partial" in name]
