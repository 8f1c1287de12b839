"""A run's folder: whether it is the same run, and where it continues."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import UserError
from app.runs.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Snapshot,
    checkpoint_folder,
    write_checkpoint,
)
from app.runs.checkpoint_state import STATE_FILE
from app.runs.folder import RunFolder, RunIdentity
from tests.train.tiny_model import checkpoint_state

IDENTITY = RunIdentity(
    "tokens", {"architecture": "gpt2", "num_layers": 2, "seed": 0, "shuffle": True}
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with the checkpoints of steps 4 and 8, which hold no tensors."""
    run, snapshot = RunFolder(tmp_path), Snapshot()
    snapshot.files = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
    for step in (4, 8):
        state = checkpoint_state(step, identity=IDENTITY.to_json())
        write_checkpoint(checkpoint_folder(run.checkpoints, step), snapshot, state)
    return run


def test_the_same_run_matches(tmp_path: Path) -> None:
    IDENTITY.check_matches(tmp_path, checkpoint_state(4, identity=IDENTITY.to_json()))


def test_every_difference_from_another_run_is_named(tmp_path: Path) -> None:
    other = RunIdentity(
        "others", {"architecture": "gpt2", "num_layers": 3, "seed": 0, "optimizer": "muon"}
    )
    differences = "; ".join(
        (
            "the dataset holds different tokens",
            "num_layers was 2 and is now 3",
            "shuffle was True and is now None",
            "optimizer was None and is now 'muon'",
        )
    )
    with pytest.raises(
        UserError, match=re.escape(f"{tmp_path} holds a different run: {differences}\n")
    ):
        other.check_matches(tmp_path, checkpoint_state(4, identity=IDENTITY.to_json()))


def test_another_architecture_is_a_difference_and_what_only_one_of_them_has_is_none(
    tmp_path: Path,
) -> None:
    qwen3 = {"architecture": "qwen3", "num_layers": 2, "head_dim": 8, "seed": 0, "shuffle": True}
    difference = "holds a different run: architecture was 'gpt2' and is now 'qwen3'\n"
    state = checkpoint_state(4, identity=IDENTITY.to_json())
    with pytest.raises(UserError, match=f"{difference}.*or set these back to continue"):
        RunIdentity("tokens", qwen3).check_matches(tmp_path, state)


@pytest.mark.parametrize(
    ("given", "recorded"),
    (
        ("openai-community/gpt2", f"openai-community/gpt2@{'6' * 40}"),
        ("openai-community/gpt2@main", f"openai-community/gpt2@{'6' * 40}"),
        ("gpt2@666666", f"gpt2@{'6' * 40}"),
        ("base", "base@100"),
        ("base@0100", "base@100"),
    ),
)
def test_the_same_weights_continue_a_run_however_they_were_named(
    tmp_path: Path, given: str, recorded: str
) -> None:
    begun = replace(
        checkpoint_state(4, identity=IDENTITY.to_json()),
        settings={"train": {"init_from": given}},
        initial_weights=recorded,
    )
    for same in (given, recorded, None):
        replace(IDENTITY, init_from=same).check_matches(tmp_path, begun)
    for other in ("openai-community/gpt2@other", "base@50", "somebody/else"):
        with pytest.raises(UserError, match=f"the weights of {recorded}, not with {other}\n"):
            replace(IDENTITY, init_from=other).check_matches(tmp_path, begun)


def test_what_this_version_does_not_know_cannot_be_set_back(tmp_path: Path) -> None:
    newer = IDENTITY.to_json() | {"rope": True}
    with pytest.raises(UserError, match=r"rope was True.*\n.*or use the version that wrote it to"):
        IDENTITY.check_matches(tmp_path, checkpoint_state(4, identity=newer))


def test_a_checkpoint_of_another_version_is_neither_renamed_nor_passed_over(run: RunFolder) -> None:
    path = run.checkpoints / "step-000008" / STATE_FILE
    path.write_text('{"state_version": 1}')
    with pytest.raises(UserError, match="is a checkpoint of another version of this program"):
        run.resume_from(IDENTITY, "auto")
    assert path.read_text() == '{"state_version": 1}'


def test_a_new_folder_starts_a_new_run(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert RunFolder(tmp_path / "run").resume_from(IDENTITY, resume) is None
    assert RunFolder(tmp_path / "run").last_saved() is None


def test_a_run_continues_from_its_last_checkpoint(run: RunFolder) -> None:
    checkpoint = run.resume_from(IDENTITY, "auto")
    assert checkpoint is not None
    assert checkpoint.step == 8
    assert run.last_saved() == checkpoint.folder


def test_another_run_is_refused_and_nothing_is_renamed(run: RunFolder) -> None:
    (run.checkpoints / "step-000008" / MODEL_FILE).unlink()
    with pytest.raises(UserError, match="holds a different run: seed was 0 and is now 1"):
        run.resume_from(RunIdentity("tokens", IDENTITY.settings | {"seed": 1}), "auto")
    assert (run.checkpoints / "step-000008").is_dir()


def test_resume_never_refuses_a_run_that_was_started(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists, with 8 steps"):
        run.resume_from(IDENTITY, "never")
    started = RunFolder(tmp_path / "started")
    started.path.mkdir()
    started.settings.write_text("{}")
    with pytest.raises(UserError, match="exists, with no checkpoint"):
        started.resume_from(IDENTITY, "never")


def test_a_damaged_checkpoint_is_reported_and_renamed(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    # What an earlier start has renamed is replaced.
    (run.checkpoints / "step-000008.damaged").mkdir()
    (run.checkpoints / "step-000008" / OPTIMIZER_FILE).write_bytes(b"")
    checkpoint = run.resume_from(IDENTITY, "auto")
    assert checkpoint is not None
    assert checkpoint.step == 4
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {run.checkpoints / 'step-000008' / OPTIMIZER_FILE}")
    assert warning.endswith("; it is now step-000008.damaged\n")
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["step-000004", "step-000008.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run: RunFolder) -> None:
    for file in run.checkpoints.glob(f"*/{MODEL_FILE}"):
        file.unlink()
    with pytest.raises(UserError, match=r"has no intact checkpoint: .*step-000008.*step-000004"):
        run.resume_from(IDENTITY, "auto")
    assert len(list(run.checkpoints.iterdir())) == 2


def test_what_a_killed_save_has_left_is_removed(run: RunFolder) -> None:
    partial = run.checkpoints / "step-000009.partial"
    partial.mkdir()
    (partial / MODEL_FILE).write_bytes(b"half")
    run.resume_from(IDENTITY, "auto")
    assert not partial.exists()


def test_a_second_owner_is_refused(run: RunFolder) -> None:
    with (
        run.lock(),
        pytest.raises(UserError, match="another process is working on"),
        run.lock(),
    ):
        pass
