import json
from pathlib import Path

import pytest

from app.errors import UserError
from app.tools.sweep.plan import PlannedRun, plan_sweep
from tests.train.processes import TINY


@pytest.fixture(autouse=True)
def place(data_dir: Path) -> Path:
    return data_dir


def plan(*sets: str, **changes: str) -> list[PlannedRun]:
    return plan_sweep(TINY | changes, sets)[1]


def test_the_runs_are_the_product_of_the_values_with_seeds_side_by_side() -> None:
    folder, runs = plan_sweep(TINY, ["train.seed=0, 1", "train.learning_rate=1e-3,2e-3"])
    assert folder == Path("data/sweeps/run")
    assert [run.name for run in runs] == [
        "run-learning_rate1e-3-seed0",
        "run-learning_rate1e-3-seed1",
        "run-learning_rate2e-3-seed0",
        "run-learning_rate2e-3-seed1",
    ]
    settings = [run.settings.train for run in runs]
    assert [(it.learning_rate, it.seed) for it in settings] == [
        *((1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1))
    ]
    assert {it.max_steps for it in settings} == {10}


def test_every_run_gets_the_dataset_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {name: text for name, text in TINY.items() if name != "TRAIN_DATASET_DIR"}
    monkeypatch.setenv("TRAIN_DATASET_DIR", TINY["TRAIN_DATASET_DIR"])
    runs = plan_sweep(flags, ["train.seed=0,1"])[1]
    assert [run.flags["TRAIN_DATASET_DIR"] for run in runs] == [TINY["TRAIN_DATASET_DIR"]] * 2


def test_values_with_commas_stand_between_semicolons() -> None:
    betas = plan("train.betas=0.9,0.95;0.9,0.99")
    assert [run.settings.train.betas for run in betas] == [(0.9, 0.95), (0.9, 0.99)]
    assert [run.name for run in betas] == ["run-betas0.9_0.95", "run-betas0.9_0.99"]


def test_every_wrong_value_of_every_run_is_reported_once_and_together() -> None:
    with pytest.raises(UserError) as error:
        plan("train.learning_rate=1e-3,7", "train.seed=x,0", "train.lr=1", "model.num_heads=3,2")
    first, *faults = error.value.problem.splitlines()
    assert first == "4 settings are wrong:"
    assert [fault.strip() for fault in faults] == [
        "--set train.lr: there is no such setting of train or model; did you mean "
        "TRAIN_LEARNING_RATE?",
        "TRAIN_SEED=x (--set): must be a whole number, such as 500, 20M, 1.5B or 1e7",
        "MODEL_EMBD_SIZE=16 (flag --embd-size) and MODEL_NUM_HEADS=3 (--set): 16 is not a multiple "
        "of 3; 15 and 18 are",
        "TRAIN_LEARNING_RATE=7 (--set): must be at most 1",
    ]


@pytest.mark.parametrize(
    ("sets", "changes", "problem"),
    (
        ([], {}, "--set is missing"),
        (["train.seed"], {}, "--set train.seed: must have values"),
        (["train.run_name=a,b"], {}, "the runs are named after the sweep"),
        (["sample.top_k=1,2"], {}, "there is no such setting of train or model"),
        (["train.seed=1", "TRAIN_SEED=2"], {}, "--set TRAIN_SEED: is given twice"),
        (["train.seed=1,"], {}, r"TRAIN_SEED \(--set\): has no value"),
        (["train.learning_rate=1e-3,0.001"], {}, "would be the same: learning_rate 0.001"),
        (["train.seed=0"], {"TRAIN_VAL_EVERY": "0"}, "TRAIN_VAL_EVERY=0 measures none"),
        (["train.seed=0"], {"TRAIN_DATASET_DIR": "none"}, "no dataset in data/none"),
        (["train.seed=0"], {"TRAIN_RUN_NAME": "a/b"}, "TRAIN_RUN_NAME=a/b"),
        (["train.seed=0"], {"TRAIN_RUN_NAME": "a" * 198}, "at most 200 characters"),
        (
            ["model.context_length=32,1024"],
            {"TRAIN_TOKENS_PER_STEP": "1024"},
            "compares held-out losses: data/text has 1,001 held-out tokens",
        ),
    ),
)
def test_a_wrong_sweep_is_refused(sets: list[str], changes: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        plan(*sets, **changes)


def test_a_run_that_was_trained_with_other_settings_is_refused() -> None:
    run, _ = plan("train.seed=0,1")
    run.folder.path.mkdir(parents=True)
    stored = {"settings": run.settings.public(), "dataset": {"fingerprint": "of another"}}
    run.folder.settings.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"run-seed0 was trained .*: the dataset holds different"):
        plan("train.seed=0,1")
    del stored["dataset"]
    run.folder.settings.write_text(json.dumps(stored))
    plan("train.seed=0,1,2", TRAIN_MICRO_BATCH_SIZE="2", TRAIN_TRACKER="wandb")
    with pytest.raises(
        UserError, match=r"run-seed0 was trained .*: max_steps was 10 and is now 20"
    ):
        plan("train.seed=0,1", TRAIN_MAX_STEPS="20")
