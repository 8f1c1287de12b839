"""The image and its containers as an engine sees them: whose they are, what they reach."""

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.containers.conftest import NONE, PROJECT, TINY, Engine

pytestmark = pytest.mark.container

# Without the override for machines without a GPU, but with the image that it built.
ON_GPU = {"COMPOSE_FILE": "compose.yaml"}
# Another one each time, or the test image would have it in this file.
TOKEN = f"hf_{secrets.token_hex(16)}"


def created(engine: Engine, service: str, variables: Mapping[str, str] = NONE) -> dict[str, Any]:
    """Return what `docker inspect` says of a service's container that never started."""
    engine.docker("compose", "create", "--force-recreate", service, variables=variables)
    container = engine.docker(
        "compose", "ps", "--all", "--quiet", service, variables=variables
    ).strip()
    inspected: dict[str, Any] = json.loads(engine.docker("inspect", container))[0]
    engine.docker("rm", container)
    return inspected


@pytest.mark.parametrize(
    ("service", "has_gpu"),
    (
        ("prepare", False),
        ("train", True),
        ("sample", True),
        ("evaluate", True),
        ("doctor", True),
        ("inspect", False),
        ("report", False),
        ("export", False),
        ("tensorboard", False),
        ("playground", True),
    ),
)
def test_the_gpu_request_reaches_the_engine(engine: Engine, service: str, has_gpu: bool) -> None:
    requests = created(engine, service, ON_GPU)["HostConfig"]["DeviceRequests"]
    if not has_gpu:
        assert not requests
        return
    (request,) = requests
    assert request["Driver"] == "nvidia"
    assert request["Capabilities"] == [["gpu"]]
    assert request["DeviceIDs"] == ["all"]
    (request,) = created(engine, service, {**ON_GPU, "GPU": "1"})["HostConfig"]["DeviceRequests"]
    assert request["DeviceIDs"] == ["1"]


def test_train_has_no_network_no_capability_and_time_to_save(engine: Engine) -> None:
    container = created(engine, "train")
    assert container["HostConfig"]["NetworkMode"] == "none"
    assert container["HostConfig"]["CapDrop"] == ["ALL"]
    assert container["HostConfig"]["ReadonlyRootfs"] is True
    assert container["Config"]["StopTimeout"] == 120
    assert container["HostConfig"]["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}


@pytest.mark.parametrize("service", ("prepare", "train"))
def test_the_user_is_not_root_and_can_write_to_the_volume_and_tmp_only(
    engine: Engine, service: str
) -> None:
    image = json.loads(engine.docker("image", "inspect", PROJECT))[0]
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["Entrypoint"] == ["python", "-m", "app"]
    assert engine.inside("id --user; id --user --name", service).split() == ["10001", "app"]
    script = (
        "find / -writable -not -type l -not -path '/proc/*' -not -path '/sys/*' "
        "-not -path '/dev/*' -not -path '/data/*' 2>/dev/null; true"
    )
    # The image's own home is his, but its file system cannot be written; that shows by trying.
    places = [place for place in engine.inside(script, service).split() if place.startswith("/")]
    tries = "; ".join(f"touch {place}/try 2>/dev/null && echo {place}" for place in places)
    assert set(engine.inside(f"{tries}; true", service).split()) == {"/data", "/tmp"}
    engine.inside("rm /data/try")


def occurrences_in_layers(engine: Engine, image: str, text: str) -> int:
    """Lines with `text` in all layers and the configuration of an image, packed or not."""
    script = (
        f"folder=$(mktemp -d); docker save {image} | tar -xC $folder; "
        "find $folder -type f -exec gzip -dcf {} + "
        f"| grep --text --count {text}; rm -r $folder"
    )
    return int(engine.run("bash", "-c", script).stdout)


def test_a_secret_is_in_no_layer_no_log_and_no_result(engine: Engine, dotenv: Path) -> None:
    dotenv.write_text(f"HF_TOKEN={TOKEN}\n")
    engine.docker("compose", "build", "prepare", "test")
    secret = TINY | {"PREPARE_OUT_DIR": "secret", "TRAIN_RUN_NAME": "secret"}
    printed = engine.job("prepare", variables=secret) + engine.job("train", variables=secret)
    printed += engine.docker("history", "--no-trunc", PROJECT)
    assert TOKEN not in printed
    found = engine.inside(f"grep --recursive --files-with-matches {TOKEN} /data /app /home; true")
    assert not found.strip()
    # The test image takes all that .dockerignore lets through.
    for image in (PROJECT, f"{PROJECT}-test"):
        assert occurrences_in_layers(engine, image, TOKEN) == 0
    # The search finds what is there.
    assert occurrences_in_layers(engine, PROJECT, "TRAIN_WARMUP_STEPS") > 0


def test_the_token_reaches_prepare_as_a_file(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    read = 'python -c "from huggingface_hub import get_token; print(get_token())"'
    given = {"HF_TOKEN_FILE": str(file)}
    assert TOKEN in engine.inside(read, service="prepare", variables=given)
    assert TOKEN not in engine.inside(read, service="train", variables=given)
    assert TOKEN not in json.dumps(created(engine, "prepare", variables=given))


def test_a_change_of_the_program_builds_only_its_own_layers(engine: Engine) -> None:
    code = engine.folder / "app" / "__init__.py"
    code.write_text(code.read_text() + "\n# changed\n")
    done = engine.run("docker", "compose", "--progress", "plain", "build", "prepare")
    log = done.stdout + done.stderr
    steps = re.findall(r"^#(\d+) (?:\[prepare )?\[?(\w+)\s+\d/\d\] (?:RUN|COPY)", log, re.M)
    cached = set(re.findall(r"^#(\d+) CACHED", log, re.M))
    assert steps, log
    # Of system, installer and packages nothing is done again, so nothing is downloaded.
    done_again = {stage for number, stage in steps if number not in cached}
    assert done_again == {"runtime"}, log


def test_the_suite_passes_in_the_test_image(engine: Engine) -> None:
    engine.docker("compose", "build", "test")
    # The others are minutes; here they would only repeat what they are outside.
    left_out = (
        "soak",
        "container",
        "processes",
        "browser",
        "lm_eval",
        "cluster",
        "sky",
        "trackers",
    )
    printed = engine.job(
        "test", "-q", "-n", "auto", "-m", " and ".join(f"not {kind}" for kind in left_out)
    )
    # Compose may print about its network after it.
    summary = re.search(r"^\d+ passed.*", printed, re.MULTILINE)
    assert summary, printed[-3000:]
    print(summary[0])


def test_files_and_settings_are_clean(engine: Engine) -> None:
    engine.docker("compose", "config", "--quiet")
    engine.docker("compose", "config", "--quiet", variables=ON_GPU)
