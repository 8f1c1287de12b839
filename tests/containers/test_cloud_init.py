"""docker/cloud-init.yaml under the eyes of the programs that will read it."""

import os
from pathlib import Path

import pytest

from tests.containers.conftest import PROJECT, Engine

pytestmark = pytest.mark.container

_MACHINE = """\
ARG BASE_IMAGE=ubuntu:24.04
FROM ${BASE_IMAGE}
RUN apt-get update && apt-get install --yes --no-install-recommends cloud-init systemd
"""
_CHECKS = """\
set -e
cloud-init schema --config-file /cloud-init.yaml
cloud-init --file /cloud-init.yaml single --name write_files --frequency always
for command in docker; do install /bin/true /usr/bin/$command; done
printf '[Service]\\nExecStart=/bin/true\\n' > /etc/systemd/system/docker.service
systemd-analyze verify /etc/systemd/system/gpt-compose.service
ls -l /etc/gpt-compose.conf /usr/local/sbin
"""


def test_cloud_init_takes_it_and_systemd_the_service_that_it_writes(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(_MACHINE)
    base = ("--build-arg", "BASE_IMAGE") if "BASE_IMAGE" in os.environ else ()
    engine.docker("build", *base, "--tag", f"{PROJECT}-machine", str(tmp_path))
    file = engine.folder / "docker" / "cloud-init.yaml"
    done = engine.run(
        *("docker", "run", "--rm", "--network=none"),
        *("--volume", f"{file}:/cloud-init.yaml:ro", f"{PROJECT}-machine", "sh", "-c", _CHECKS),
    )
    printed = done.stdout + done.stderr
    assert "Valid" in printed, printed
    assert "-rwxr-xr-x 1 root root" in printed, printed
    for problem in ("gpt-compose.service:", "Failed", "WARNING", "ERROR"):
        assert problem not in printed, printed
