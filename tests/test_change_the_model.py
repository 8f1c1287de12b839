"""The changes of docs/change-the-model.md: each is applied to a fresh clone, trained, continued."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.data.dataset import open_dataset
from app.data.token_stream import TokenStream
from app.data.tokenizer import Tokenizer
from app.errors import ExitCode
from app.runs.checkpoint import Checkpoint
from app.runs.checkpoints import latest_checkpoint
from app.runs.metrics import read_metrics
from tests.pages import REPOSITORY
from tests.train.code_clone import Clone

PAGE = (REPOSITORY / "docs" / "change-the-model.md").read_text("utf-8")
CHANGES = {
    title: (diff, script)
    for title, diff, script in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```$.*?^```sh after the diff\n(.*?)^```$",
        PAGE,
        flags=re.MULTILINE | re.DOTALL,
    )
}
MOST_LINES = 20
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
SMALL = {
    "PREPARE_TOTAL_TOKENS": "4000",
    "PREPARE_VAL_TOKENS": "200",
    "MODEL_NUM_LAYERS": "1",
    "MODEL_EMBD_SIZE": "64",
    "MODEL_NUM_HEADS": "2",
    "TRAIN_TOKENS_PER_STEP": "256",
    "TRAIN_WARMUP_STEPS": "0",
    "TRAIN_VAL_TOKENS": "128",
    "TRAIN_DEVICE": "cpu",
    "TRAIN_COMPILE": "false",
    "SAMPLE_MAX_TOKENS": "4",
}


def run(script: str, folder: Path, exit_code: int = 0, **variables: str) -> str:
    """Run a script of the page in a folder of a program, and return what it prints."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | SMALL | {"PYTHONPATH": str(folder), "PATH": PATH} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == exit_code, script + done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the baseline's dataset and run."""
    folder = tmp_path_factory.mktemp("data")
    baseline = "python -m app prepare\npython -m app train"
    run(baseline, REPOSITORY, DATA_DIR=str(folder), RECIPE="demo", TRAIN_MAX_STEPS="3")
    return folder


def test_the_page_has_the_changes_and_they_are_short() -> None:
    assert CHANGES.keys() == {
        *("Another activation", "Rotary positions", "Another optimizer", "Another data source")
    }
    for title, (diff, _) in CHANGES.items():
        added = re.findall(r"^\+(?!\+\+ ).*\S", diff, flags=re.MULTILINE)
        assert 0 < len(added) < MOST_LINES, title


def tensors(checkpoint: Checkpoint) -> tuple[set[str], set[str]]:
    """The names of the model's and of the optimizer's tensors."""
    found = checkpoint.tensors()
    return set(found["model"]), set(found["optimizer"])


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("title", CHANGES)
def test_a_change_is_trained_beside_the_baseline(title: str, data: Path, tmp_path: Path) -> None:
    diff, script = CHANGES[title]
    (tmp_path / "change.diff").write_text(diff)
    repository = Clone(tmp_path / "clone")
    repository.git("apply", str(tmp_path / "change.diff"))
    clone = repository.folder
    (clone / "pages").mkdir()
    for number in range(40):
        page = (
            f"<style>p {{}}</style><p>Page {number} of a <b>long</b> book &amp; its text.</p>" * 9
        )
        (clone / "pages" / f"{number}.html").write_text(page)
    (name,) = re.findall(r"--run-name (\S+)", script)[-1:]
    folder = data / "runs" / name
    assert "Total tokens processed: 768" in run(
        script, clone, DATA_DIR=str(data), TRAIN_MAX_STEPS="3"
    )
    continued = run(script, clone, DATA_DIR=str(data), TRAIN_MAX_STEPS="4")
    assert "continues at step 3\n" in continued
    patch = (folder / "code.patch").read_text("utf-8").splitlines()
    assert set(re.findall(r"^\+(?!\+\+ ).*", diff, flags=re.MULTILINE)) <= set(patch)

    losses = [record.train_loss for record in read_metrics(folder / "metrics.jsonl")]
    baseline = [record.train_loss for record in read_metrics(data / "runs/demo/metrics.jsonl")]
    assert len(losses) == 4
    checkpoint = latest_checkpoint(folder)
    of_model, of_optimizer = tensors(checkpoint)
    if title == "Another optimizer":
        # The first loss is from before the first update.
        assert losses[0] == baseline[0]
        assert {name.partition(".")[0] for name in of_optimizer} == {"exp_avg"}
    assert losses[1:3] != baseline[1:3]
    assert ("transformer.wpe.weight" in of_model) == (title != "Rotary positions")
    if title == "Another activation":
        assert checkpoint.state.model["activation"] == "relu2"
    if title == "Another data source":
        dataset = open_dataset(data / "pages4K")
        inputs, _ = TokenStream(dataset.train).sequences(np.arange(2), 256)
        text = Tokenizer().decode(inputs.ravel().tolist())
        assert re.search(r"Page \d+ of a long book & its text\.", text)
        assert not re.search("[<{]p", text.replace("<|endoftext|>", ""))
    is_gpt2 = title in ("Another optimizer", "Another data source")
    export = f"python -m app export --run-name {name}"
    exported = run(
        export, clone, 0 if is_gpt2 else ExitCode.USER, DATA_DIR=str(data), RECIPE="demo"
    )
    assert ("app/model computes is not a GPT2LMHeadModel: " in exported) != is_gpt2
