"""Checkpoints of a tiny model: written and read again, and damage in every region detected."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.errors import UserError
from app.runs.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    Snapshot,
    checkpoint_folder,
    open_checkpoint,
    write_checkpoint,
)
from app.runs.checkpoint_state import STATE_FILE, CorruptCheckpoint
from app.runs.checkpoints import (
    checkpoint_steps,
    latest_checkpoint,
    latest_valid,
    prune_checkpoints,
    remove_partial_checkpoints,
)
from tests.train.tiny_model import adamw, checkpoint_state, new_model, train_one_step

FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    model, taken = new_model(), Snapshot()
    optimizers = adamw(model)
    train_one_step(model, optimizers)
    taken.take(model, optimizers)
    return taken


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, snapshot: Snapshot) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for step in (4, 8):
        write_checkpoint(checkpoint_folder(folder, step), snapshot, checkpoint_state(step))
    return folder


@pytest.fixture
def checkpoints(tmp_path: Path, written: Path) -> Path:
    """A folder with the checkpoints of steps 4 and 8."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def check(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    return checkpoint


def test_a_checkpoint_is_read_as_it_was_written(checkpoints: Path) -> None:
    model = new_model()
    optimizers = adamw(model)
    train_one_step(model, optimizers)
    other = new_model(seed=1)
    others = adamw(other)

    checkpoint = check(checkpoints / "step-000008")
    assert {path.name for path in checkpoint.folder.iterdir()} == set(FILES)
    assert checkpoint.step == checkpoint.state.step == 8
    checkpoint.load(other, others)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    expected = dict(optimizers.named_state(model))
    torch.testing.assert_close(dict(others.named_state(other)), expected, rtol=0, atol=0)
    assert checkpoint.tensors()["optimizer"].keys() == expected.keys()


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(checkpoints: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"in model\.safetensors it lacks weight; it lacks bias;"):
        open_checkpoint(checkpoints / "step-000008").load_model(model)


def rewrite(folder: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> Checkpoint:
    """Write a checkpoint again, with its hashes, as another version might have."""
    state, whole = open_checkpoint(folder).state, Snapshot()
    whole.files = {name: load_file(folder / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
    change(whole.files[file])
    write_checkpoint(folder, whole, state)
    return check(folder)


BIAS = "transformer.ln_f.bias"
MOMENT = f"exp_avg_sq.{BIAS}"


@pytest.mark.parametrize(
    ("file", "change", "difference"),
    (
        (MODEL_FILE, lambda it: it.pop(BIAS), f"it lacks {BIAS}"),
        (MODEL_FILE, lambda it: it.update(new=torch.ones(1)), "it has new as well"),
        (
            MODEL_FILE,
            lambda it: it.update({BIAS: it[BIAS].half()}),
            f"{BIAS} is torch.float16 [8], not torch.float32 [8]",
        ),
        (
            MODEL_FILE,
            lambda it: it.update({BIAS: torch.ones(9)}),
            f"{BIAS} is torch.float32 [9], not torch.float32 [8]",
        ),
        (
            MODEL_FILE,
            lambda it: [it.pop(name) for name in sorted(it)[:5]],
            "; and 2 more",
        ),
        (OPTIMIZER_FILE, lambda it: it.pop(MOMENT), f"it lacks {MOMENT}"),
        (OPTIMIZER_FILE, lambda it: it.update(new=torch.ones(1)), "it has new as well"),
        (
            OPTIMIZER_FILE,
            lambda it: it.update({MOMENT: it[MOMENT].bfloat16()}),
            f"{MOMENT} is torch.bfloat16 [8], not torch.float32 [8]",
        ),
    ),
)
def test_tensors_of_another_version_are_named_and_not_called_damage(
    checkpoints: Path,
    file: str,
    change: Callable[[dict[str, Tensor]], object],
    difference: str,
) -> None:
    checkpoint, model = rewrite(checkpoints / "step-000008", file, change), new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="is a checkpoint of another version") as refused:
        checkpoint.load(model, adamw(model))
    assert not isinstance(refused.value, CorruptCheckpoint)
    assert f"in {file} " in refused.value.problem
    assert difference in refused.value.problem
    assert "delete" not in refused.value.fix
    if file == MODEL_FILE:
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_checkpoint_of_other_files_is_another_versions_and_stands(checkpoints: Path) -> None:
    folder = checkpoints / "step-000008"
    snapshot = Snapshot()
    snapshot.files = {"weights.safetensors": {"new": torch.ones(1)}}
    write_checkpoint(folder, snapshot, open_checkpoint(folder).state)
    with pytest.raises(
        UserError, match=r"another version .* state\.json lists no model\.safetensors"
    ):
        latest_valid(checkpoints)
    with pytest.raises(UserError, match="another version"):
        latest_checkpoint(checkpoints.parent)
    assert latest_checkpoint(checkpoints.parent, 4).step == 4


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("region", range(8))
def test_a_flipped_byte_in_any_region_of_any_file_is_detected(
    checkpoints: Path, file: str, region: int
) -> None:
    """In the first byte, the last one and between: lengths, header, tensors, JSON."""
    folder = checkpoints / "step-000008"
    size = (folder / file).stat().st_size
    flip_byte(folder / file, (0, 1, 8, 20, size // 3, size // 2, size - 2, size - 1)[region])
    with pytest.raises(CorruptCheckpoint, match=file):
        check(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage", (truncate, lambda path: path.write_bytes(b""), Path.unlink), ids=("half", "0", "none")
)
def test_the_checkpoint_before_a_damaged_one_is_the_latest_valid(
    checkpoints: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoints / "step-000008" / file)
    checkpoint, (error,) = latest_valid(checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert str(checkpoints / "step-000008") in error.problem
    assert error.fix.startswith(f"delete {checkpoints / 'step-000008'} to continue")


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "step-000008", checkpoints / "step-000009")
    with pytest.raises(CorruptCheckpoint, match="holds the checkpoint of step 8"):
        open_checkpoint(checkpoints / "step-000009")


def test_a_loaded_model_needs_no_optimizer_state(checkpoints: Path) -> None:
    (checkpoints / "step-000008" / OPTIMIZER_FILE).unlink()
    assert latest_checkpoint(checkpoints.parent).step == 8
    assert latest_checkpoint(checkpoints.parent, 4).step == 4


def test_a_missing_run_or_step_is_refused_with_those_that_exist(
    checkpoints: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 5\n.*one of: 4, 8"):
        latest_checkpoint(tmp_path, 5)
    (run := tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "new").mkdir()
    with pytest.raises(UserError, match=r"there is no run .*\n.*train first, or correct DATA_DIR"):
        latest_checkpoint(run.with_name("missing"))
    checkpoints.rename(run / "checkpoints")
    with pytest.raises(UserError, match=r"there is no run .*\n.*TRAIN_RUN_NAME to one of: mine$"):
        latest_checkpoint(run.with_name("missing"))
    with pytest.raises(UserError, match=r"has no checkpoint yet\n.* TRAIN_RUN_NAME to .*: mine$"):
        latest_checkpoint(run.with_name("new"))


def test_pruning_keeps_the_last_checkpoints_and_the_best(
    tmp_path: Path, snapshot: Snapshot
) -> None:
    for step, val_loss in enumerate((5.0, 3.0, 4.0, None, 6.0, 4.0)):
        state = checkpoint_state(step, val_loss=val_loss)
        write_checkpoint(checkpoint_folder(tmp_path, step), snapshot, state)
        prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-000001", "step-000004", "step-000005")
    ]


def test_a_run_that_wants_its_best_checkpoint_has_it_in_place_of_the_last(
    tmp_path: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine" / "checkpoints"
    folder.mkdir(parents=True)

    def write(step: int, val_loss: float | None, *, use_best: bool = True) -> None:
        settings = {"train": {"use_best": use_best}}
        state = replace(checkpoint_state(step, val_loss=val_loss), settings=settings)
        write_checkpoint(checkpoint_folder(folder, step), snapshot, state)

    write(1, 5.0)
    write(2, 3.25)
    write(3, 3.5)
    assert latest_checkpoint(tmp_path / "mine").step == 2
    assert capsys.readouterr().err == (
        "of mine, step 2 has the lowest held-out loss: 3.2500, and the last, 3, 3.5000\n"
    )
    assert latest_checkpoint(tmp_path / "mine", 3).step == 3
    weights = checkpoint_folder(folder, 2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path / "mine").step == 3
    write(4, 3.0)
    assert latest_checkpoint(tmp_path / "mine").step == 4
    assert capsys.readouterr().err == ""
    # Stopped between two measurements.
    write(5, None)
    assert latest_checkpoint(tmp_path / "mine").step == 4
    assert capsys.readouterr().err == (
        "of mine, step 4 has the lowest held-out loss: 3.0000, and the last, 5, was not measured\n"
    )
    # A tool may want another one than the run.
    assert latest_checkpoint(tmp_path / "mine", use_best=False).step == 5
    write(6, 3.5, use_best=False)
    assert latest_checkpoint(tmp_path / "mine").step == 6
    assert capsys.readouterr().err == ""
    assert latest_checkpoint(tmp_path / "mine", use_best=True).step == 4


def test_pruning_keeps_what_was_saved_before_a_cooldown(tmp_path: Path, snapshot: Snapshot) -> None:
    # The run was continued after its first cool-down, and cooled down again.
    for step, cooldown_start in ((1, 2), (2, 2), (3, 2), (4, 5), (5, 5), (6, 5), (7, 5)):
        state = replace(checkpoint_state(step), cooldown_start=cooldown_start)
        write_checkpoint(checkpoint_folder(tmp_path, step), snapshot, state)
        prune_checkpoints(tmp_path, 1)
    assert checkpoint_steps(tmp_path) == [2, 5, 7]


def test_pruning_keeps_what_was_saved_before_a_cooldown_that_a_time_limit_moved(
    tmp_path: Path, snapshot: Snapshot
) -> None:
    for step, cooldown_start in ((70, 90), (80, 90), (90, 79), (100, 79), (110, 79)):
        state = replace(checkpoint_state(step), cooldown_start=cooldown_start)
        write_checkpoint(checkpoint_folder(tmp_path, step), snapshot, state)
        prune_checkpoints(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [80, 100, 110]


def test_a_checkpoint_whose_replacement_was_killed_is_restored(checkpoints: Path) -> None:
    whole = checkpoints / "step-000008"
    whole.rename(whole.with_name("step-000008.old.partial"))
    whole.with_name("step-000008.partial").mkdir()
    remove_partial_checkpoints(checkpoints)
    assert checkpoint_steps(checkpoints) == [4, 8]
    assert len(list(checkpoints.iterdir())) == 2
    check(whole)
