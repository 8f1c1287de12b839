"""docker/cloud-init.yaml, read as a file: what must agree with the rest of the project."""

import configparser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import ExitCode
from tests.newcomer import REPOSITORY

CLOUD_INIT = REPOSITORY / "docker" / "cloud-init.yaml"

# systemd's and Compose's spellings of the durations that are used here
UNIT_SECONDS = {"h": 3600, "min": 60, "m": 60, "s": 1, "": 1}


def seconds(duration: str) -> int:
    match = re.fullmatch(r"(\d+)(h|min|m|s|)", duration)
    assert match, f"not one number and one unit: {duration}"
    return int(match[1]) * UNIT_SECONDS[match[2]]


def load(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text())
    assert isinstance(document, dict)
    return document


@pytest.fixture
def files() -> dict[str, str]:
    written = load(CLOUD_INIT)["write_files"]
    return {Path(file["path"]).name: file["content"] for file in written}


@pytest.fixture
def unit(files: dict[str, str]) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(files["gpt-compose.service"])
    return parser


@pytest.fixture
def services() -> dict[str, Any]:
    found = load(REPOSITORY / "compose.yaml")["services"]
    assert isinstance(found, dict)
    return found


def test_the_first_line_tells_providers_what_it_is() -> None:
    assert CLOUD_INIT.read_text().startswith("#cloud-config\n")


def test_what_is_run_is_written_and_executable() -> None:
    document = load(CLOUD_INIT)
    executable = {f["path"] for f in document["write_files"] if f.get("permissions") == "0755"}

    assert {command[0] for command in document["runcmd"]} <= executable


@pytest.mark.parametrize("script", ("gpt-compose-setup", "gpt-compose-run"))
def test_the_scripts_are_bash(files: dict[str, str], script: str) -> None:
    subprocess.run(["bash", "-n"], input=files[script], text=True, check=True)


def test_every_variable_to_edit_is_used(files: dict[str, str]) -> None:
    variables = re.findall(r"^(\w+)=", files["gpt-compose.conf"], re.MULTILINE)
    scripts = files["gpt-compose-setup"] + files["gpt-compose-run"]

    assert variables
    assert [name for name in variables if f"${name}" not in scripts] == []


def test_the_recipe_it_starts_with_exists(files: dict[str, str]) -> None:
    (recipe,) = re.findall(r"^RECIPE=(.+)$", files["gpt-compose.conf"], re.MULTILINE)

    assert (REPOSITORY / "app" / "recipes" / f"{recipe}.env").is_file()


def test_its_services_exist(files: dict[str, str], services: dict[str, Any]) -> None:
    named = re.findall(r"^compose_run (\w+)$", files["gpt-compose-run"], re.MULTILINE)
    named += re.findall(r"^in_container\(\).* (\w+) \"", files["gpt-compose-setup"], re.MULTILINE)

    assert named == ["prepare", "train", "train"]
    assert set(named) <= services.keys()


def test_only_a_bug_or_a_kill_is_started_again(
    files: dict[str, str], unit: configparser.ConfigParser
) -> None:
    prevented = {int(code) for code in unit["Service"]["RestartPreventExitStatus"].split()}
    success = {int(code) for code in unit["Service"]["SuccessExitStatus"].split()}

    assert unit["Service"]["Restart"] == "on-failure"
    assert prevented == {
        ExitCode.USER,
        ExitCode.NOT_FINITE,
        ExitCode.EXHAUSTED,
        ExitCode.NETWORK,
    }
    assert success == {ExitCode.SIGINT, ExitCode.SIGTERM}
    # The network's code is not started again because the script has already waited.
    assert f"((code == {ExitCode.NETWORK:d}))" in files["gpt-compose-run"]


def test_restarts_are_bounded(unit: configparser.ConfigParser) -> None:
    restarts_end_after = int(unit["Unit"]["StartLimitBurst"]) * seconds(
        unit["Service"]["RestartSec"]
    )

    assert restarts_end_after < seconds(unit["Unit"]["StartLimitIntervalSec"])


def test_a_stop_leaves_time_for_the_checkpoint(
    unit: configparser.ConfigParser, services: dict[str, Any]
) -> None:
    grace_s = max(seconds(services[name]["stop_grace_period"]) for name in ("prepare", "train"))

    assert seconds(unit["Service"]["TimeoutStopSec"]) > grace_s


def test_its_container_is_the_one_that_is_stopped(
    files: dict[str, str], unit: configparser.ConfigParser
) -> None:
    (name,) = re.findall(r"--name (\S+)", files["gpt-compose-run"])

    for key in ("ExecStartPre", "ExecStop", "ExecStopPost"):
        assert unit["Service"][key.lower()].split()[-1] == name
