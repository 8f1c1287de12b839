import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.errors import UserError
from app.runs.checkpoint import Checkpoint
from app.runs.checkpoint_state import (
    STATE_FILE,
    CheckpointState,
    CorruptCheckpoint,
    PendingWork,
)
from app.runs.code import changed_files, code_hashes
from app.runs.metrics import StepRecord
from tests.train.tiny_model import checkpoint_state

RECORD = StepRecord(3, 1024, 4.5, lr=1e-3, grad_norm=0.5, step_ms=12.0, val_ms=7.0)


def rewrite(folder: Path, content: dict[str, Any]) -> None:
    """Write state.json with the right hash of other content."""
    rest = {name: value for name, value in content.items() if name != "sha256_of_the_rest"}
    whole = json.dumps(rest, sort_keys=True).encode()
    rest["sha256_of_the_rest"] = hashlib.sha256(whole).hexdigest()
    (folder / STATE_FILE).write_text(json.dumps(rest))


def read_json(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / STATE_FILE).read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    "pending", (PendingWork(), PendingWork(record=RECORD), PendingWork(samples=True))
)
def test_a_state_is_read_as_it_was_written(tmp_path: Path, pending: PendingWork) -> None:
    state = checkpoint_state(4, val_loss=3.5, identity={"seed": 0}, pending=pending)
    state.write(tmp_path)
    assert CheckpointState.read(tmp_path) == state


def test_a_state_from_before_loss_scaling_has_none(tmp_path: Path) -> None:
    state = checkpoint_state(4)
    state.write(tmp_path)
    content = read_json(tmp_path)
    assert (content.pop("loss_scale"), content.pop("loss_scale_updates")) == (None, 0)
    rewrite(tmp_path, content)
    assert CheckpointState.read(tmp_path) == state


def test_a_state_from_before_the_code_was_recorded_differs_from_no_code(tmp_path: Path) -> None:
    state = checkpoint_state(4)
    state.write(tmp_path)
    content = read_json(tmp_path)
    assert (content.pop("source"), content.pop("code_hashes")) == ({}, {})
    # Earlier hashes were of the files' bytes, comments included.
    rewrite(tmp_path, content | {"source_hashes": {"app/model/gpt.py": "0"}})
    assert CheckpointState.read(tmp_path) == state
    assert changed_files(Checkpoint(tmp_path, state)) == []
    other = replace(state, code_hashes=code_hashes() | {"app/model/gpt.py": "0"})
    assert changed_files(Checkpoint(tmp_path, other)) == ["app/model/gpt.py"]


def test_a_state_without_an_architecture_is_a_gpt2s(tmp_path: Path) -> None:
    state = checkpoint_state(4, identity={"seed": 0})
    state.write(tmp_path)
    content = read_json(tmp_path)
    for key in ("model", "identity"):
        assert content[key].pop("architecture") == "gpt2"
    rewrite(tmp_path, content)
    assert CheckpointState.read(tmp_path) == state


@pytest.mark.parametrize(
    ("pending", "is_true", "left"),
    (
        (PendingWork(), False, {}),
        (PendingWork(samples=True), True, {"samples": True}),
        (PendingWork(record=RECORD), True, {"record": RECORD.to_json()}),
    ),
)
def test_pending_work_is_true_if_there_is_any(
    pending: PendingWork, *, is_true: bool, left: dict[str, Any]
) -> None:
    assert bool(pending) is is_true
    assert pending.to_json() == left


def test_the_keys_of_state_json_are_those_that_other_programs_read(tmp_path: Path) -> None:
    checkpoint_state(4, val_loss=3.5).write(tmp_path)
    assert read_json(tmp_path).keys() == {
        *("step", "micro_batch_size", "model", "settings", "identity", "versions"),
        *("windows_consumed", "val_loss", "left", "metrics_lines", "samples_bytes"),
        *("warmup_steps", "cooldown_start", "planned_steps", "origin"),
        *("initial_weights", "val_tokens", "source", "code_hashes"),
        *("loss_scale", "loss_scale_updates"),
        *("state_version", "sha256", "sha256_of_the_rest"),
    }


def test_keys_that_came_later_may_be_missing(tmp_path: Path) -> None:
    checkpoint_state(4).write(tmp_path)
    content = read_json(tmp_path)
    del content["warmup_steps"], content["cooldown_start"], content["origin"]
    rewrite(tmp_path, content)
    assert CheckpointState.read(tmp_path) == checkpoint_state(4)


def test_missing_keys_are_all_named_as_another_versions(tmp_path: Path) -> None:
    checkpoint_state(4).write(tmp_path)
    content = read_json(tmp_path)
    del content["windows_consumed"], content["model"]
    rewrite(tmp_path, content)
    with pytest.raises(UserError, match="missing or invalid: model, windows_consumed") as refused:
        CheckpointState.read(tmp_path)
    assert not isinstance(refused.value, CorruptCheckpoint)
    assert "is a checkpoint of another version of this program" in refused.value.problem


def test_more_keys_do_no_harm(tmp_path: Path) -> None:
    state = checkpoint_state(4)
    state.write(tmp_path)
    rewrite(tmp_path, read_json(tmp_path) | {"new": 1})
    assert CheckpointState.read(tmp_path) == state


def test_the_state_of_another_program_is_not_called_damage(tmp_path: Path) -> None:
    # What `datasets` writes beside a saved dataset.
    (tmp_path / STATE_FILE).write_text('{"_data_files": [], "_fingerprint": "9c1e"}')
    with pytest.raises(UserError, match="is not the state of a checkpoint") as refused:
        CheckpointState.read(tmp_path)
    assert not isinstance(refused.value, CorruptCheckpoint)


@pytest.mark.parametrize(
    "content", ("", "{", "[]", "4", '{"state_version": 2}', '{"state_version": 2, "step": "x"}')
)
def test_what_is_not_a_state_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    with pytest.raises(CorruptCheckpoint, match=r"state\.json"):
        CheckpointState.read(tmp_path)


def test_a_changed_value_is_damage(tmp_path: Path) -> None:
    checkpoint_state(4).write(tmp_path)
    content = read_json(tmp_path) | {"windows_consumed": 17}
    (tmp_path / STATE_FILE).write_text(json.dumps(content))
    with pytest.raises(CorruptCheckpoint, match="its SHA-256 does not match"):
        CheckpointState.read(tmp_path)


def test_a_flipped_bit_anywhere_is_damage(tmp_path: Path) -> None:
    checkpoint_state(4, val_loss=3.5, pending=PendingWork(record=RECORD)).write(tmp_path)
    path = tmp_path / STATE_FILE
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint):
            CheckpointState.read(tmp_path)


def test_another_version_is_not_called_damage(tmp_path: Path) -> None:
    checkpoint_state(4).write(tmp_path)
    newer = read_json(tmp_path) | {"state_version": 3}
    rewrite(tmp_path, newer)
    with pytest.raises(UserError, match="version 3, this program reads 2") as refused:
        CheckpointState.read(tmp_path)
    assert not isinstance(refused.value, CorruptCheckpoint)
    # The first version had no hash of itself.
    (tmp_path / STATE_FILE).write_text(json.dumps({"state_version": 1}))
    with pytest.raises(UserError, match="version 1, this program reads 2"):
        CheckpointState.read(tmp_path)
