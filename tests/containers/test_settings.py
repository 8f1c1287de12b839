"""How settings come into a container, and what is refused there."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.containers.conftest import DEMO, TINY, Engine

pytestmark = pytest.mark.container


def test_the_first_of_flag_option_shell_dotenv_recipe_counts(engine: Engine, dotenv: Path) -> None:
    dotenv.write_text(
        "PREPARE_TOTAL_TOKENS=5000\nPREPARE_VAL_TOKENS=500\nPREPARE_SHARD_SIZE=1000\n"
        "PREPARE_DATASET=nowhere.txt\nDATA_DIR=/elsewhere\n"
    )
    engine.job(
        *("prepare", "--total-tokens", "4000", "--out-dir", "who-wins"),
        options=("--env", "PREPARE_TOTAL_TOKENS=3000", "--env", "PREPARE_VAL_TOKENS=400"),
        variables={
            **DEMO,
            "PREPARE_VAL_TOKENS": "300",
            "PREPARE_SHARD_SIZE": "2000",
            "PREPARE_OUT_DIR": "from-the-shell",
            "PREPARE_DATASET": "stdlib",
        },
    )
    manifest = json.loads(engine.inside("cat /data/who-wins/manifest.json"))
    tokens = [shard["tokens"] for shard in manifest["shards"] if shard["split"] == "train"]
    assert tokens == [2000, 2000]
    assert manifest["source"]["dataset"] == "stdlib"
    held_out = sum(s["tokens"] for s in manifest["shards"] if s["split"] == "val")
    assert held_out == 401


@pytest.mark.parametrize(
    ("name", "meant"),
    (("TRAIN_LERNING_RATE", "TRAIN_LEARNING_RATE"), ("TRIAN_MAX_STEPS", "TRAIN_MAX_STEPS")),
)
def test_a_misspelt_name_in_dotenv_is_refused_inside(
    engine: Engine, dotenv: Path, name: str, meant: str
) -> None:
    dotenv.write_text(f"{name}=1\n")
    printed = engine.job("train", code=2)
    assert (
        f"error: {name} (environment): there is no such setting; did you mean {meant}?" in printed
    )


def test_the_example_copied_as_it_is_changes_nothing(engine: Engine, dotenv: Path) -> None:
    before = engine.docker("compose", "config")
    shutil.copy(engine.folder / ".env.example", dotenv)
    assert engine.docker("compose", "config") == before


def test_a_folder_of_ones_own_works_for_its_owner_and_explains_itself_to_others(
    engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o755)
    os.chown(folder, 4321, 4321)
    tmp_path.chmod(0o755)
    mine = TINY | {"DATA_VOLUME": str(folder)}
    printed = engine.job("prepare", code=2, variables=mine)
    assert "no permission to write or read /data/tiny" in printed
    assert "sudo chown -R 10001:10001" in printed
    assert "RUN_AS=UID:GID" in printed
    mine["RUN_AS"] = "4321:4321"
    engine.job("prepare", variables=mine)
    # A user whom /etc/passwd does not know can compile as well.
    engine.job("train", variables=mine | {"TRAIN_COMPILE": "true"})
    assert (folder / "runs" / "tiny" / "checkpoints" / "step-000004").stat().st_uid == 4321
