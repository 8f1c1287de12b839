"""Models of the hub, by its protocol over real sockets: downloaded, refused, tried again."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.model.transformers_models import gpt2
from tests.prepare.loopback_hub import Fault, Hub

pytestmark = pytest.mark.processes

CHECKOUT = Path(__file__).parents[2]
NAME, WEIGHTS = "openai-community/gpt2", "model.safetensors"
# Downloads models one after the other, and prints how each of them ended.
DOWNLOAD = """
import json, sys
from pathlib import Path
from app.errors import AppError
from app.prepare.hub_client import Repository
from app.prepare.hub_model import download_model
for name, revision, token in json.loads(sys.argv[1]):
    try:
        repository = Repository(name, revision, "model")
        folder, commit = download_model(repository, Path("cache"), token, (0.1,))
        print("result", json.dumps([commit, sorted(path.name for path in folder.iterdir())]))
    except AppError as error:
        print("result", json.dumps([type(error).__name__, error.problem, error.fix]))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as openai-community/gpt2 is, with files for other programs."""
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    gpt2(n_layer=1).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("GPT-2")
    return folder


@pytest.fixture
def hub(stored: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.publish(NAME, stored)
        hub.renamed["gpt2"] = NAME
        yield hub


def environment(hub: Hub, folder: Path, **variables: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    own = {"PYTHONPATH": str(CHECKOUT), "HF_HOME": str(folder / "home")}
    return {**kept, **hub.variables, **own, "HF_HUB_DOWNLOAD_TIMEOUT": "2", **variables}


def download(
    hub: Hub, folder: Path, *models: tuple[str, str, str | None], **variables: str
) -> tuple[list[Any], str]:
    """Return how each download ended, and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, json.dumps(models)],
        cwd=folder,
        env=environment(hub, folder, **variables),
        capture_output=True,
        text=True,
        check=True,
    )
    marked = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    return [json.loads(line.removeprefix("result ")) for line in marked], done.stdout + done.stderr


def requests(hub: Hub, where: str) -> list[str]:
    return [request.line for request in hub.requests if where in request.line]


def test_faults_cost_time_and_files_are_kept(hub: Hub, stored: Path, tmp_path: Path) -> None:
    size, commit = (stored / WEIGHTS).stat().st_size, hub.main[NAME]
    hub.faults = [
        Fault("GET api/models", status=503, times=1),
        Fault(f"GET storage/.*/{WEIGHTS}", body="cut", times=1),
    ]
    # What a killed download has left is continued.
    begun = tmp_path / "cache/models/openai-community--gpt2" / commit / f"{WEIGHTS}.partial"
    begun.parent.mkdir(parents=True)
    begun.write_bytes((stored / WEIGHTS).read_bytes()[:1000])
    (ended,), output = download(hub, tmp_path, (NAME, "main", None))
    assert ended == [commit, ["config.json", "files.json", WEIGHTS]]
    assert output.count("trying again in 0.1 s") == 2
    assert begun.with_name(WEIGHTS).read_bytes() == (stored / WEIGHTS).read_bytes()
    parts = {line.split()[-1] for line in requests(hub, f"GET {NAME}/resolve/{commit}/{WEIGHTS}")}
    assert parts == {f"bytes=1000-{size - 1}"}
    # Another program's files are not.
    assert not requests(hub, "pytorch_model.bin")

    hub.down()
    again = [(NAME, "main", None), (NAME, "other", None), ("somebody/else", "main", None)]
    results, _ = download(hub, tmp_path, *again, HF_HUB_OFFLINE="1")
    assert results[0] == ended
    for _, problem, fix in results[1:]:
        assert "HF_HUB_OFFLINE=1 forbids asking the hub" in problem
        assert "point TRAIN_INIT_FROM to a folder" in fix
    begun.with_name(WEIGHTS).write_bytes(b"damaged")
    (damaged,), _ = download(hub, tmp_path, (NAME, "main", None))
    assert f"{WEIGHTS} is damaged: its SHA-256 does not match" in damaged[1]
    assert "delete cache/models/openai-community--gpt2" in damaged[2]


def test_models_that_cannot_be_had(hub: Hub, stored: Path, tmp_path: Path) -> None:
    token = f"hf_{secrets.token_hex(16)}"
    hub.publish("somebody/gated", stored)
    hub.gates["somebody/gated"] = token
    for name, changes in (("other", {"vocab_size": 32000}), ("pickle", {})):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((stored / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        (folder / ("pytorch_model.bin" if name == "pickle" else WEIGHTS)).write_bytes(b"weights")
        hub.publish(f"somebody/{name}", folder)
    wrong = tmp_path / "cache/models/gpt2" / hub.main[NAME] / f"{WEIGHTS}.partial"
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"other bytes")
    results, output = download(
        hub,
        tmp_path,
        ("somebody/other", "main", None),
        ("somebody/pickle", "main", None),
        ("nobody/nothing", "main", None),
        (NAME, "0" * 40, None),
        ("somebody/gated", "main", None),
        ("somebody/gated", "main", token),
        ("gpt2", "main", None),
        ("gpt2", "main", None),
    )
    other, pickle, nothing, revision, gated, opened, differing, again = results
    assert "vocab_size is 32000, not 50257" in other[1]
    assert "has its weights as a pickle only" in pickle[1]
    assert not requests(hub, f"somebody/other/resolve/{hub.main['somebody/other']}/{WEIGHTS}")
    assert "there is no model nobody/nothing on the hub" in nothing[1]
    assert "correct TRAIN_INIT_FROM; a private model needs HF_TOKEN" in nothing[2]
    assert f"{NAME} has no revision '{'0' * 40}'" in revision[1]
    assert "correct what follows the @ in TRAIN_INIT_FROM" in revision[2]
    assert "is gated, and it cannot be read without a token" in gated[1]
    assert opened[0] == hub.main["somebody/gated"]
    assert token not in output
    assert differing[0] == "NetworkError"
    assert "is not what the hub has: its hash differs" in differing[1]
    assert again[0] == hub.main[NAME]


@pytest.mark.slow
def test_prepare_downloads_what_train_begins_with(hub: Hub, stored: Path, tmp_path: Path) -> None:
    """As in the containers, where train has no network."""
    settings = {
        "TRAIN_INIT_FROM": "gpt2@main",
        "PREPARE_DATASET": "stdlib",
        "PREPARE_TOTAL_TOKENS": "2000",
        "PREPARE_VAL_TOKENS": "200",
        "PREPARE_OUT_DIR": "text",
        "TRAIN_TOKENS_PER_STEP": "128",
        "TRAIN_MICRO_BATCH_SIZE": "1",
        "TRAIN_PRECISION": "float32",
        "TRAIN_LEARNING_RATE": "1e-12",
        "TRAIN_MAX_STEPS": "1",
        "TRAIN_COMPILE": "false",
        "TRAIN_DEVICE": "cpu",
    }

    def run(command: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "app", command],
            cwd=tmp_path,
            env=environment(hub, tmp_path, **settings, **variables),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout

    assert "downloading gpt2 from the hub, 9" in run("prepare")
    hub.down()
    output = run("train", TRAIN_PROCESSES="2")
    source = f"gpt2@{hub.main[NAME]}"
    assert f"data/runs/text: new, with the weights of {source}\n" in output
    state = json.loads((tmp_path / "data/runs/text/checkpoints/step-000001/state.json").read_text())
    assert state["initial_weights"] == source
    assert state["model"]["num_layers"] == 1
    assert "data/runs/text is finished: all 1 step" in run("train")
    # Both processes have the weights, and measure a share of the three sequences.
    (shard,) = (tmp_path / "data/text").glob("*_val_*.bin")
    tokens = torch.from_numpy(np.fromfile(shard, "<u2", offset=1024).astype(np.int64))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(stored)(tokens[:192].view(3, 64)).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[1:193]).item()
    (line,) = (tmp_path / "data/runs/text/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["val_loss"] == pytest.approx(expected, abs=1e-4)


def test_prepare_goes_on_without_a_run_that_is_trained_later(hub: Hub, tmp_path: Path) -> None:
    """A name without an owner may be one of the hub, or a run; one with an owner is the hub's."""
    (tmp_path / "a.txt").write_text("A line of text.\n" * 2000)

    def prepare(init_from: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app", "prepare", "--dataset", "a.txt"],
            cwd=tmp_path,
            env=environment(hub, tmp_path, TRAIN_INIT_FROM=init_from),
            capture_output=True,
            text=True,
            check=False,
        )

    done = prepare("base")
    assert done.returncode == 0, done
    assert "warning: there is no model base on the hub, and " in done.stderr
    assert "; or train the run base first\n" in done.stderr
    assert "\nnext: " in done.stdout
    refused = prepare("nobody/base")
    assert refused.returncode == 2
    assert "error: there is no model nobody/base on the hub" in refused.stderr
