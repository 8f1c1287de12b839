"""Own text: when it is what a command is about, and the sizes that fit it."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from app.settings.own_text import FITTED, note, sizes
from app.settings.settings import Settings
from app.settings.sources import load_settings, resolve
from tests.newcomer import settle

CPU = {"TRAIN_DEVICE": "cpu"}


@pytest.fixture(autouse=True)
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)


def load(command: str = "train", **flags: str) -> Settings:
    return load_settings({**CPU, **flags}, command)


def dataset(name: str, tokens: int = 300_000, kind: str = "files", *, age: float = 0) -> None:
    folder = Path("data", name)
    folder.mkdir(parents=True)
    manifest = {"source": {"dataset": kind}, "totals": {"train_tokens": tokens}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.utime(folder / "manifest.json", (1e9 - age, 1e9 - age))


def chosen(command: str = "train", **flags: str) -> tuple[str | None, str]:
    """Return the recipe and the dataset of a command."""
    settings = load(command, **flags)
    folder = settings.prepare_dir if command == "prepare" else settings.train_dataset_dir
    return settings.general.recipe, folder.name


def test_without_own_text_nothing_is_chosen() -> None:
    assert chosen() == (None, "fineweb20M")
    dataset("stdlib4M", kind="stdlib")
    dataset("stories", kind="hub")
    Path("data", "broken").mkdir()
    Path("data", "broken", "manifest.json").write_text("{")
    assert chosen() == (None, "fineweb20M")
    assert load().train.max_steps == 38


@pytest.mark.parametrize("name", ("texts", "~/texts", "a.txt", "/x/*.md", "./missing", "a b.jsonl"))
@pytest.mark.parametrize("command", ("prepare", "train", "doctor", "sample"))
def test_local_text_has_its_own_recipe(name: str, command: str) -> None:
    Path("texts").mkdir()
    recipe, folder = chosen(command, PREPARE_DATASET=name)
    assert recipe == "own-text"
    assert folder == load(PREPARE_DATASET=name).prepare.dataset_name
    assert load(PREPARE_DATASET=name).prepare.total_tokens == "all"


@pytest.mark.parametrize("name", ("stdlib", "roneneldan/TinyStories", "hub"))
def test_other_datasets_have_none(name: str) -> None:
    Path("hub").mkdir()
    Path("hub", "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    assert chosen(PREPARE_DATASET=name)[0] is None


def test_train_takes_the_own_text_that_was_prepared_last() -> None:
    dataset("old", age=10)
    dataset("new")
    dataset("newest", kind="stdlib", age=-10)
    for command in ("train", "doctor", "sample", "evaluate", "export", "report", "playground"):
        assert chosen(command) == ("own-text", "new")
    assert load().run_dir == Path("data", "runs", "new")
    assert chosen(TRAIN_RUN_NAME="x") == ("own-text", "new")
    assert chosen("inspect") == (None, "fineweb20M")
    assert chosen("prepare") == (None, "fineweb20M")


def test_what_is_set_wins() -> None:
    dataset("new")
    assert chosen(RECIPE="demo") == ("demo", "demo")
    assert chosen(RECIPE="own-text") == ("own-text", "new")
    assert chosen(TRAIN_DATASET_DIR="old") == (None, "old")
    assert chosen(RECIPE="own-text", TRAIN_DATASET_DIR="old") == ("own-text", "old")
    assert chosen(PREPARE_DATASET="b.txt") == ("own-text", "b")
    # The named run of a tool has its own text; that of train and doctor is to be.
    assert chosen("sample", TRAIN_RUN_NAME="fineweb20M") == (None, "fineweb20M")
    assert load("evaluate", RECIPE="own-text", TRAIN_RUN_NAME="old").train.dataset_dir is None
    assert chosen("doctor", TRAIN_RUN_NAME="x") == chosen("train", TRAIN_RUN_NAME="x")
    assert chosen("doctor", TRAIN_RUN_NAME="x") == ("own-text", "new")
    dataset("fineweb20M", kind="hub")
    assert chosen() == (None, "fineweb20M")
    assert chosen(PREPARE_TOTAL_TOKENS="1M") == ("own-text", "new")


def test_values_of_the_recipe_give_way_to_ones_own() -> None:
    dataset("mine")
    settings = load(TRAIN_MAX_STEPS="7", MODEL_EMBD_SIZE="96", MODEL_NUM_LAYERS="auto")
    assert (settings.train.max_steps, settings.train.val_every) == (7, 1)
    assert (settings.model.embd_size, settings.model.num_heads) == (96, 1)
    assert settings.model.num_layers == 4
    assert settings.train.use_best
    with pytest.raises(Exception, match=r"MODEL_NUM_HEADS=5 .* 128 is not a multiple of 5"):
        load(MODEL_NUM_HEADS="5")


def test_auto_works_in_any_recipe() -> None:
    dataset("mine", 1_000_000)
    flags = {"RECIPE": "demo", "TRAIN_DATASET_DIR": "mine", "TRAIN_MAX_STEPS": "auto"}
    settings = load(**flags)
    assert settings.train.tokens_per_step == 1024
    assert settings.train.max_steps == -(-2 * 1_000_000 // 1024)
    assert note(settings) == ""


def test_weights_that_are_trained_further_bring_their_own_sizes() -> None:
    dataset("mine", 300_000)
    further = {"TRAIN_INIT_FROM": "openai-community/gpt2"}
    assert chosen(**further, PREPARE_DATASET="a.txt")[0] is None
    model = load(**further, RECIPE="own-text", TRAIN_DATASET_DIR="mine").model
    assert (model.embd_size, model.num_layers) == (768, 12)
    assert "embd_size" not in model.model_fields_set


@pytest.mark.parametrize("on_gpu", (False, True))
@pytest.mark.parametrize("tokens", (300, 20_000, 321_226, 4_000_000, 25_000_000, 10**9))
@pytest.mark.parametrize("length", (16, 256, 1000))
def test_sizes_fit_every_text(tokens: int, length: int, *, on_gpu: bool) -> None:
    values = sizes(tokens, length, {}, on_gpu=on_gpu)
    assert values.keys() == FITTED
    assert all(value >= 1 for value in values.values())
    assert values["TRAIN_TOKENS_PER_STEP"] % length == 0
    assert values["MODEL_EMBD_SIZE"] % values["MODEL_NUM_HEADS"] == 0
    trained = values["TRAIN_MAX_STEPS"] * values["TRAIN_TOKENS_PER_STEP"]
    assert trained >= tokens
    more = sizes(2 * tokens, length, {}, on_gpu=on_gpu)
    assert more["MODEL_EMBD_SIZE"] >= values["MODEL_EMBD_SIZE"]
    assert 0 < values["TRAIN_VAL_EVERY"] <= values["TRAIN_MAX_STEPS"]


def test_a_run_keeps_its_sizes_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset("mine")
    begun = load()
    run = Path("data", "runs", "mine")
    (run / "checkpoints" / "step-000010").mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps({"settings": begun.public()}))
    again = load_settings({"TRAIN_DEVICE": "cuda"}, "train")
    kept: dict[str, Any] = {"model": begun.model, "max_steps": begun.train.max_steps}
    assert kept == {"model": again.model, "max_steps": again.train.max_steps}
    assert load(TRAIN_MAX_STEPS="2000").train.max_steps == 2000
    other = load_settings({"TRAIN_DEVICE": "cuda", "TRAIN_RUN_NAME": "new"}, "train")
    assert other.model.embd_size > begun.model.embd_size


def test_a_branch_has_the_sizes_of_the_run_that_it_begins_with() -> None:
    dataset("mine", 300_000)
    begun = load()
    run = Path("data", "runs", "mine")
    run.mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps({"settings": begun.public()}))
    dataset("more", 2_000_000, age=-10)
    of_branch = {"TRAIN_DEVICE": "cuda", "TRAIN_RUN_NAME": "b", "TRAIN_BRANCH_FROM": "mine@7"}
    branch = load(**of_branch)
    assert branch.model == begun.model
    assert branch.train.tokens_per_step == begun.train.tokens_per_step == 1024
    # The steps are those of its own text.
    assert branch.train.max_steps == -(-3 * 2_000_000 // 1024)
    assert load(**of_branch, MODEL_NUM_LAYERS="5").model.num_layers == 5
    alone = load(**of_branch | {"TRAIN_BRANCH_FROM": "missing"})
    assert (alone.model.embd_size, alone.train.tokens_per_step) == (384, 8192)


def test_a_mac_has_the_sizes_for_a_cpu() -> None:
    dataset("mine")
    widths = {name: load(TRAIN_DEVICE=name).model.embd_size for name in ("cpu", "mps", "cuda")}
    assert widths == {"cpu": 128, "mps": 128, "cuda": 256}


def test_the_note_says_what_was_chosen() -> None:
    dataset("mine", 321_226)
    settings = load()
    assert note(settings) == (
        f"RECIPE=own-text, by the size of this text: {settings.model.num_layers} layers of width "
        f"{settings.model.embd_size}, {settings.train.max_steps:,} steps of "
        f"{settings.train.tokens_per_step:,} tokens"
    )


def test_settings_of_a_new_shell_are_those_of_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    def found_by(flags: dict[str, str]) -> tuple[str | None, Path]:
        settings = resolve(flags, "train")
        return settings.general.recipe, settings.train_dataset_dir

    monkeypatch.setenv("RECIPE", "demo")
    assert found_by({}) == (None, Path("data/fineweb20M"))
    Path(".env").write_text("RECIPE=demo\nDATA_DIR=here\n")
    assert found_by({}) == ("demo", Path("here/demo"))
    assert found_by({"RECIPE": "original"}) == ("original", Path("here/original20M"))
    monkeypatch.setenv("DATA_DIR", "/data")
    assert found_by({}) == ("demo", Path("here/demo"))
    monkeypatch.setenv("IN_CONTAINER", "1")
    assert found_by({}) == ("demo", Path("/data/demo"))


@pytest.mark.parametrize(
    "recorded",
    ({"train": {"max_steps": 7}}, {"model": [], "train": None}, ["model"], "damaged", None),
)
def test_a_damaged_record_is_no_obstacle(recorded: object) -> None:
    dataset("mine")
    expected = load().train.max_steps
    run = Path("data", "runs", "mine")
    (run / "checkpoints" / "step-000010").mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps({"settings": recorded}))
    assert load().train.max_steps == expected
    assert load(TRAIN_BRANCH_FROM="mine", TRAIN_RUN_NAME="new").train.max_steps == expected


@pytest.mark.parametrize("tokens", ("x", None, [], math.nan, math.inf))
def test_a_damaged_manifest_counts_as_none(tokens: Any) -> None:
    dataset("mine", tokens)
    assert (
        load().train.max_steps
        == load(TRAIN_DATASET_DIR="missing", RECIPE="own-text").train.max_steps
    )
