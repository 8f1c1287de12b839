"""cloud/sky.yaml, and what the pages tell to type, read by SkyPilot's own parsers."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import ExitCode
from tests.pages import PAGES, REPOSITORY, blocks

SKY = REPOSITORY / ".venv-sky" / "bin" / "python"
TASK = REPOSITORY / "cloud" / "sky.yaml"
READ_TASK = """
import json, sys
import sky
from sky.utils import yaml_utils
config = yaml_utils.safe_load(sys.stdin.read())
task = sky.Task.from_yaml_config(config, [tuple(one.split("=", 1)) for one in sys.argv[1:]])
print(json.dumps(task.to_yaml_config()))
"""
READ_COMMANDS = """
import shlex, sys
from sky.client.cli.command import cli
for line in sys.argv[1:]:
    command, words = cli, shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)
"""


def read_by_sky(
    home: Path, program: str, *words: str, text: str = ""
) -> subprocess.CompletedProcess[str]:
    assert SKY.exists(), "make test-sky makes its environment"
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [SKY, "-c", program, *words],
        input=text,
        cwd=REPOSITORY,
        env=os.environ
        | unreachable
        | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def task() -> dict[str, Any]:
    document = yaml.safe_load(TASK.read_text())
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("part", ("setup", "run"))
def test_its_scripts_are_bash(task: dict[str, Any], part: str) -> None:
    subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


def test_what_it_names_exists(task: dict[str, Any]) -> None:
    files = re.findall(r"requirements/\S+|cloud/\S+", task["setup"] + task["run"])

    assert len(files) == 4
    assert [file for file in files if not (REPOSITORY / file).is_file()] == []
    assert (REPOSITORY / "app" / "recipes" / f"{task['envs']['RECIPE']}.env").is_file()
    assert f"BUCKET_DIR={next(iter(task['file_mounts']))} " in task["run"]


@pytest.mark.sky
def test_sky_reads_the_task(tmp_path: Path) -> None:
    read = result(read_by_sky(tmp_path, READ_TASK, "BUCKET=ours", text=TASK.read_text()))

    assert read["file_mounts"]["/bucket"]["name"] == "ours"
    assert read["file_mounts"]["/bucket"]["mode"] == "MOUNT"
    for choice in read["resources"]["any_of"]:
        assert choice["use_spot"]
        # The machine is told to stop before SkyPilot knows that it goes.
        assert choice["job_recovery"]["recover_on_exit_codes"] == [ExitCode.SIGTERM]


@pytest.mark.sky
@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    (
        ("use_spot:", "use_spots:", "use_spots"),
        ("mode: MOUNT", "mode: MOUNTED", "MOUNTED"),
        ("[143]", "[1430]", "1430"),
    ),
)
def test_sky_refuses_what_is_misspelt(tmp_path: Path, right: str, wrong: str, told: str) -> None:
    text = TASK.read_text()
    assert right in text
    done = read_by_sky(tmp_path, READ_TASK, "BUCKET=ours", text=text.replace(right, wrong))
    assert done.returncode != 0
    assert told in done.stderr


@pytest.mark.sky
def test_a_bucket_has_to_be_named(tmp_path: Path) -> None:
    done = read_by_sky(tmp_path, READ_TASK, text=TASK.read_text())
    assert done.returncode != 0
    assert "BUCKET" in done.stderr


@pytest.mark.sky
def test_sky_knows_the_commands_of_the_pages(tmp_path: Path) -> None:
    lines = [line for page in PAGES for block in blocks(page) for line in block.script.splitlines()]
    commands = [line for line in lines if line.startswith("sky ")]
    assert any("--num-nodes" in command for command in commands)
    right = read_by_sky(tmp_path, READ_COMMANDS, *commands)
    assert right.returncode == 0, right.stderr
    wrong = read_by_sky(tmp_path, READ_COMMANDS, "sky jobs launch --nodes 4 cloud/sky.yaml")
    assert "--nodes" in wrong.stderr
