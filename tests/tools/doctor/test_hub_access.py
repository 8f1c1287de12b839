"""Check the hub against a server that speaks its protocol on loopback."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import ExitCode
from app.formats import format_bytes
from app.tools.doctor.checks import Finding
from tests.model.transformers_models import gpt2
from tests.prepare.hub_folders import write_fineweb
from tests.prepare.loopback_hub import Fault, Hub
from tests.tools.doctor.doctor_process import doctor, environment
from tests.train.processes import CHECKOUT, TINY

PUBLIC, GATED = "HuggingFaceFW/fineweb", "somebody/gated"
TOKEN, OTHER = f"hf_{secrets.token_hex(16)}", f"hf_{secrets.token_hex(16)}"
ASK = """
import json, sys
from dataclasses import asdict
from app.errors import ExitCode
from app.tools.doctor.checks import run_check
from app.prepare.hub_client import Repository
from app.tools.doctor.inputs import check_hub
dataset, revision, token = sys.argv[1:]
rows = run_check("hub", lambda: check_hub(Repository(dataset, revision), token or None))
print(json.dumps([asdict(row) for row in rows]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as hub:
        folder = write_fineweb(tmp_path / "fineweb", [["some text"]])
        hub.publish(PUBLIC, folder)
        hub.publish(GATED, folder)
        hub.gates[GATED] = TOKEN
        hub.revoked = {OTHER}
        yield hub


def ask(
    hub: Hub, tmp_path: Path, dataset: str, token: str = "", revision: str = "main"
) -> list[Finding]:
    """Check the hub in a new process, because its libraries read the hub's address only once."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", ASK, dataset, revision, token],
        env={
            **kept,
            **hub.variables,
            "PYTHONPATH": str(CHECKOUT),
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert not token or token not in done.stdout + done.stderr
    return [Finding(**row) for row in json.loads(done.stdout)]


def dataset_requests(hub: Hub) -> list[str]:
    """Return the requests for a dataset; the hub's library makes others by itself."""
    return [request.line for request in hub.requests if "api/datasets/" in request.line]


def test_a_public_dataset_costs_one_small_request(hub: Hub, tmp_path: Path) -> None:
    (found,) = ask(hub, tmp_path, PUBLIC)
    assert found.status == "pass"
    assert found.found.endswith(f"gives {PUBLIC}; no token is set, and none is needed")
    assert len(dataset_requests(hub)) == 1


def test_a_gated_dataset_needs_its_token(hub: Hub, tmp_path: Path) -> None:
    (found,) = ask(hub, tmp_path, GATED, TOKEN)
    assert found.status == "pass"
    assert found.found.endswith("which is gated; the token is accepted")
    (found,) = ask(hub, tmp_path, GATED)
    assert found.status == "fail"
    assert "is gated, and it cannot be read without a token" in found.found
    assert "set HF_TOKEN" in found.fix
    (found,) = ask(hub, tmp_path, GATED, f"hf_{secrets.token_hex(16)}")
    assert found.status == "fail"
    assert "is gated, and this token may not read it" in found.found
    assert "accept its terms" in found.fix


@pytest.mark.parametrize("dataset", (PUBLIC, GATED))
def test_an_invalid_token_is_not_taken_for_a_gate(hub: Hub, tmp_path: Path, dataset: str) -> None:
    (found,) = ask(hub, tmp_path, dataset, OTHER)
    assert found.status == "fail"
    assert "the hub does not know this token (401)" in found.found
    assert "set HF_TOKEN to a new one" in found.fix


@pytest.mark.parametrize(
    "token",
    (f"{TOKEN} {OTHER}", f"{TOKEN}\n{OTHER}", "hf_schlüssel"),
    ids=("space", "line break", "umlaut"),
)
def test_an_impossible_token_is_neither_sent_nor_shown(
    hub: Hub, tmp_path: Path, token: str
) -> None:
    (found,) = ask(hub, tmp_path, PUBLIC, token)
    assert found.status == "fail"
    assert found.found == "the token has characters that no token of the hub has"
    assert dataset_requests(hub) == []


def test_prepare_does_not_show_such_a_token_either(hub: Hub, tmp_path: Path) -> None:
    here = {**hub.variables, "PREPARE_DATASET": GATED, "HF_TOKEN": f"{TOKEN}\n{OTHER}"}
    ended = subprocess.run(
        [sys.executable, "-m", "app", "prepare"],
        env=environment(tmp_path, {**here, "HF_HOME": str(tmp_path / "home")}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == ExitCode.USER
    assert ended.stderr.startswith("error: the token has characters that no token of the hub has")
    assert TOKEN not in ended.stdout + ended.stderr


def test_a_missing_dataset_or_revision_is_reported(hub: Hub, tmp_path: Path) -> None:
    (found,) = ask(hub, tmp_path, "nobody/nothing")
    assert "there is no dataset nobody/nothing on the hub" in found.found
    (found,) = ask(hub, tmp_path, PUBLIC, revision="0" * 40)
    assert "has no revision" in found.found
    assert "PREPARE_DATASET_REVISION" in found.fix


@pytest.mark.parametrize(
    ("fault", "problem"),
    (
        (Fault("GET api/datasets", status=503), "the hub does not answer: 503"),
        (
            Fault("GET api/datasets", status=403),
            "the hub refuses HuggingFaceFW/fineweb with status 403",
        ),
        (Fault("GET api/datasets", body="stall"), "the hub does not answer"),
        (Fault("GET api/datasets", body="reset"), "the hub does not answer"),
        (Fault("GET api/datasets", status=200), "is not the hub, but perhaps a log-in page"),
        (Fault("GET api/datasets", down=True), "the hub does not answer"),
    ),
)
def test_a_failing_hub_is_asked_once(hub: Hub, tmp_path: Path, fault: Fault, problem: str) -> None:
    hub.faults = [fault]
    (found,) = ask(hub, tmp_path, PUBLIC)
    assert (found.check, found.status) == ("hub", "fail")
    assert problem in found.found
    assert found.fix
    assert len(dataset_requests(hub)) == 1


@pytest.mark.slow
def test_the_table_has_the_hub_but_not_the_token(hub: Hub, tmp_path: Path) -> None:
    # This test does not need the device.
    here = {**hub.variables, "TRAIN_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    here |= {"PREPARE_DATASET": GATED, "HF_HOME": str(tmp_path / "home")}
    result = doctor(tmp_path, variables=here)
    result.assert_failed("hub", "is gated", "HF_TOKEN")
    result = doctor(tmp_path, variables={**here, "HF_TOKEN": TOKEN})
    assert result.rows["hub"].status == "pass"
    assert TOKEN not in result.output + result.error
    hub.down()
    doctor(tmp_path, variables=here).assert_failed("hub", "the hub does not answer", "connect")


def test_a_model_to_begin_with_is_checked_without_its_weights(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    gpt2(n_layer=1).save_pretrained(folder)
    hub.publish("somebody/gpt2", folder)
    here = {**hub.variables, "TRAIN_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    here |= {"HF_HOME": str(tmp_path / "home"), "TRAIN_TOKENS_PER_STEP": "64"}
    here |= {name: "" for name in TINY if name.startswith("MODEL_")}
    result = doctor(tmp_path, variables={**here, "TRAIN_INIT_FROM": "somebody/gpt2"})
    assert result.rows["weights"].status == "warn"
    found = result.rows["weights"].found
    assert found.startswith("not downloaded yet; ")
    assert found.endswith("gives somebody/gpt2; no token is set, and none is needed")
    assert not [it for it in hub.requests if "model.safetensors" in it.line]
    # Of 2.4M parameters, not the 124M of the default, after steps 4, 8 and 10.
    found = result.rows["disk space"].found
    assert "87.6 MB of 3 checkpoints" in found
    size = format_bytes((folder / "model.safetensors").stat().st_size)
    assert found.endswith(f" of caches, {size} of somebody/gpt2)")
    result = doctor(tmp_path, variables={**here, "TRAIN_INIT_FROM": str(folder)})
    assert result.rows["weights"].status == "pass", result.output
    hub.gates["somebody/gpt2"] = TOKEN
    result = doctor(tmp_path, variables={**here, "TRAIN_INIT_FROM": "somebody/gpt2"})
    result.assert_failed("weights", "somebody/gpt2 is gated", "HF_TOKEN")
