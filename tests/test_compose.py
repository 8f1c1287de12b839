"""compose.yaml and the Dockerfile, read as files: what must agree with the program, and be safe."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import containers
from app.settings.settings import VARIABLES
from tests.newcomer import REPOSITORY

COMPOSE = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
JOBS = SERVICES.keys() - {"test"}
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")


def test_every_setting_of_the_shell_reaches_every_container() -> None:
    for name in JOBS:
        environment = SERVICES[name]["environment"]
        passed_on = {variable for variable, value in environment.items() if value is None}
        ways_to_the_hub = {"HF_ENDPOINT", *PROXIES, *map(str.lower, PROXIES)}
        reaches_the_hub = name in ("prepare", "doctor", "lm-eval")
        assert passed_on & ways_to_the_hub == (ways_to_the_hub if reaches_the_hub else set())
        settings = passed_on - ways_to_the_hub - {"HF_TOKEN"}
        assert settings == VARIABLES.keys() - {"DATA_DIR", "HF_TOKEN"}
        assert environment["DATA_DIR"] == "/data"


def test_only_who_asks_the_hub_gets_the_token() -> None:
    asking = {"prepare", "doctor"}
    assert {name for name in SERVICES if "secrets" in SERVICES[name]} == asking
    for name in asking:
        assert SERVICES[name]["environment"]["HF_TOKEN"] is None
    for name in JOBS - asking:
        assert SERVICES[name]["environment"]["HF_TOKEN"] == ""


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].startswith("${RUN_AS:-10001:")
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["stop_grace_period"] == "2m"
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_what_computes_on_the_model_gets_the_gpu_and_nothing_else() -> None:
    on_gpu = {"train", "sweep", "sample", "evaluate", "lm-eval", "playground", "doctor"}
    assert {name for name in SERVICES if "deploy" in SERVICES[name]} == on_gpu
    for name, service in SERVICES.items():
        environment = service["environment"]
        assert (environment.get("NVIDIA_VISIBLE_DEVICES") == "void") == (name not in on_gpu)
        assert ("EXPECTS_GPU" in environment) == (name in on_gpu)


def test_an_image_is_built_by_one_service_and_pulled_by_none() -> None:
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert sorted(built) == sorted({service["image"] for service in SERVICES.values()})
    assert "build" in SERVICES["prepare"]
    for service in SERVICES.values():
        assert ("build" in service) == (service.get("pull_policy", "missing") == "missing")


def test_only_what_needs_the_network_has_it() -> None:
    offline = {name for name in SERVICES if SERVICES[name].get("network_mode") == "none"}
    assert offline == SERVICES.keys() - {
        "prepare",
        "report",
        "tensorboard",
        "lm-eval",
        "playground",
        "doctor",
    }


def test_no_command_starts_another_and_up_starts_only_the_two() -> None:
    assert {name for name in SERVICES if "profiles" not in SERVICES[name]} == {"prepare", "train"}
    assert not [name for name in SERVICES if "depends_on" in SERVICES[name]]
    assert not [name for name in SERVICES if "restart" in SERVICES[name]]


def test_up_serves_the_report_and_run_writes_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    entrypoint = [word.replace("$$", "$") for word in SERVICES["report"]["entrypoint"]]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    written, served = "-m app report", "-m app report --serve --host=0.0.0.0"
    for words, stdin, started in (
        ([], subprocess.DEVNULL, served),
        ([], subprocess.PIPE, written),
        (["one", "two"], subprocess.DEVNULL, f"{written} one two"),
    ):
        ended = subprocess.run(
            entrypoint + words, env=path, stdin=stdin, capture_output=True, text=True, check=True
        )
        assert ended.stdout == f"{started}\n"


def test_the_example_lists_what_the_files_take_with_its_defaults() -> None:
    example = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    compose = (REPOSITORY / "compose.yaml").read_text(encoding="utf-8")
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    defaults = set(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", compose))
    defaults |= set(re.findall(r"^ARG (BASE_IMAGE|TORCH|TORCH_INDEX)=(.*)$", dockerfile, re.M))
    # Some are settings as well.
    settings = {(name, text) for name, text in defaults if name in VARIABLES}
    assert settings == {
        (n, VARIABLES[n].default_text(VARIABLES[n].variables()[n])) for n, _ in settings
    }
    of_containers = {(name, default) for name, (default, _) in containers.VARIABLES.items()}
    assert defaults - settings == of_containers
    for variable, default in defaults:
        assert f"#{variable}={default}\n" in example


def test_the_cpu_override_lacks_no_service_with_a_gpu() -> None:
    override = (REPOSITORY / "docker" / "compose.cpu.yaml").read_text(encoding="utf-8")
    for name in SERVICES:
        line = re.search(rf"^  {name}: (.*)$", override, re.M)
        assert line, f"docker/compose.cpu.yaml does not have {name}"
        without_gpu = 'deploy: !reset null, environment: {EXPECTS_GPU: ""}' in line[1]
        assert without_gpu == ("deploy" in SERVICES[name])
