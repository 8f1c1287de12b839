"""One file of text, from `prepare` to a sample, with the commands that are printed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from app.errors import UserError
from app.settings.settings import Settings
from app.settings.sources import RECIPES, load_settings
from app.tools.doctor.checks import Context, run_check
from app.tools.doctor.inputs import check_text
from app.tools.prepare import dataset_spec, prepare, print_next
from tests.newcomer import settle, type_in

SMALL = (
    "MODEL_CONTEXT_LENGTH=32 MODEL_EMBD_SIZE=32 MODEL_NUM_LAYERS=1 TRAIN_TOKENS_PER_STEP=512 "
    "TRAIN_COMPILE=false TRAIN_DEVICE=cpu TRAIN_PRECISION=float32 SAMPLE_MAX_TOKENS=3"
)
VERSES = "".join(f"Verse {n}\nof {n % 7} lines\nand words: {n * n}\n\n" for n in range(400))


@pytest.fixture(autouse=True)
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)


@pytest.mark.slow
def test_three_commands_from_a_file_to_a_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my verses.txt").write_text(VERSES)
    for name, value in (setting.split("=") for setting in SMALL.split()):
        monkeypatch.setenv(name, value)
    assert type_in("prepare --dataset 'my verses.txt'", monkeypatch) == 0
    *_, recipe, next_line = capsys.readouterr().out.splitlines()
    assert recipe == "local text uses RECIPE=own-text; RECIPE=NAME chooses another"
    assert next_line == "next: python -m app train with the same settings"
    assert type_in("train", monkeypatch) == 0
    printed = capsys.readouterr().out
    tokens = json.loads(Path("data/my-verses/manifest.json").read_text())["totals"]["train_tokens"]
    steps = -(-3 * tokens // 512)
    assert (
        f"RECIPE=own-text, by the size of this text: 1 layer of width 32, {steps} steps of 512"
        in printed
    )
    every = -(-steps // 10)
    losses = re.findall(r"after (\d+) steps: val_loss:", printed)
    assert losses == [*(str(step) for step in range(every, steps, every)), str(steps)]
    assert type_in("sample --max-tokens 3", monkeypatch) == 0
    assert capsys.readouterr().out.startswith("data/runs/my-verses/checkpoints/step-0")
    begun = json.loads(Path("data/runs/my-verses/settings.json").read_text())["settings"]
    assert begun["train"]["max_steps"] == steps
    assert begun["general"]["recipe"] == "own-text"


def loaded(line: str) -> Settings:
    """Return the settings of `prepare` with these flags."""
    words = dict(word.split("=") for word in line.split())
    return load_settings(words, "prepare")


@pytest.mark.parametrize(
    ("flags", "needed"),
    (
        ("PREPARE_DATASET=a.txt", ""),
        ("PREPARE_DATASET=a.txt PREPARE_OUT_DIR=b", ""),
        ("PREPARE_DATASET=a.txt DATA_DIR=x", " --data-dir x"),
        ("PREPARE_DATASET=a.txt RECIPE=demo", " --recipe demo"),
        ("PREPARE_DATASET=a.txt RECIPE=demo PREPARE_OUT_DIR=b", " --recipe demo --dataset-dir b"),
        ("PREPARE_TOTAL_TOKENS=20M", ""),
        ("PREPARE_TOTAL_TOKENS=1M", " --dataset-dir fineweb1M"),
        ("RECIPE=demo", " --recipe demo"),
        ("RECIPE=finetune PREPARE_DATASET=a.txt", " --recipe finetune"),
        (
            "PREPARE_DATASET=a.txt TRAIN_INIT_FROM=openai-community/gpt2",
            " --dataset-dir a20M --init-from openai-community/gpt2",
        ),
        ("RECIPE=demo TRAIN_MAX_STEPS=9", " --recipe demo with the same settings"),
        ("RECIPE=gpt2-124M PREPARE_TOTAL_TOKENS=5", " --recipe gpt2-124M"),
    ),
)
def test_prepare_ends_with_the_shortest_command_that_finds_its_dataset(
    flags: str, needed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = loaded(flags)
    if settings.general.recipe == "own-text":
        written(settings)
    assert following(settings, capsys) == f"python -m app train{needed}"
    monkeypatch.setenv("IN_CONTAINER", "1")
    monkeypatch.setenv("DATA_DIR", str(settings.general.data_dir))
    without = re.sub(" --data-dir [^ ]+", "", needed)
    assert following(settings, capsys) == f"docker compose run --rm train{without}"


def test_an_earlier_text_and_one_beside_fineweb_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (loaded(f"PREPARE_DATASET={name}.txt") for name in ("a", "b"))
    written(first)
    assert following(first, capsys) == "python -m app train"
    written(second, age=-10)
    assert following(second, capsys) == "python -m app train"
    assert following(first, capsys) == "python -m app train --recipe own-text --dataset-dir a"
    Path("data/fineweb20M").mkdir()
    assert following(second, capsys) == "python -m app train --recipe own-text"
    Path(".env").write_text("RECIPE=own-text\n")
    assert following(second, capsys) == "python -m app train"
    Path(".env").write_text("PREPARE_DATASET=b.txt\n")
    assert following(second, capsys) == "python -m app train"


@pytest.mark.parametrize("container", ("", "1"))
def test_what_train_would_read_again_gives_way(
    container: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a container, .env arrives as the environment, for every command."""
    places = {"DATA_DIR": "data", "TRAIN_DATASET_DIR": "old", "IN_CONTAINER": container}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    settings = loaded("PREPARE_DATASET=a.txt")
    written(settings)
    _, _, flags = following(settings, capsys).partition(" train")
    assert flags == " --recipe own-text --dataset-dir a"
    monkeypatch.setenv("TRAIN_DATASET_DIR", "a")
    assert following(settings, capsys).endswith(" train --recipe own-text")


def test_each_text_that_is_fine_tuned_on_has_its_run() -> None:
    runs = [
        loaded(f"RECIPE=finetune PREPARE_DATASET=a.txt{more}").run_dir.name
        for more in ("", " PREPARE_OUT_DIR=poems")
    ]
    assert runs == ["finetune", "poems"]


def following(settings: Settings, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the command that prepare ends with."""
    print_next(settings)
    return capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")


def written(settings: Settings, *, age: float = 0) -> None:
    """Write the manifest of a dataset of local text."""
    settings.prepare_dir.mkdir(parents=True, exist_ok=True)
    manifest = settings.prepare_dir / "manifest.json"
    manifest.write_text('{"source": {"dataset": "files"}, "totals": {"train_tokens": 9}}')
    os.utime(manifest, (1e9 - age, 1e9 - age))


@pytest.mark.parametrize("recipe", ("own-text", "finetune", "./mine.env"))
def test_a_recipe_for_any_text_needs_one(recipe: str) -> None:
    """Not all of FineWeb, which nobody has named."""
    shutil.copy(RECIPES / "own-text.env", "mine.env")
    with pytest.raises(UserError, match="PREPARE_DATASET does not name one") as raised:
        prepare(loaded(f"RECIPE={recipe}"))
    assert raised.value.problem.startswith(f"RECIPE={recipe} takes all of a text")
    assert not Path("data").exists()
    (found,) = run_check("text", lambda: check_text(Context(loaded(f"RECIPE={recipe}"))))
    assert (found.status, found.found) == ("fail", raised.value.problem)
    for named in ("PREPARE_DATASET=a/b", "PREPARE_TOTAL_TOKENS=5"):
        assert dataset_spec(loaded(f"RECIPE={recipe} {named}")).source.dataset
    assert dataset_spec(loaded("PREPARE_TOTAL_TOKENS=all")).total_tokens is None
