"""A copy of the checkout, and the real engine that builds and runs it there."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from app import containers
from app.settings.settings import VARIABLES
from tests.newcomer import copy_checkout

PROJECT = "gpt-compose-tests"
NONE: Mapping[str, str] = {}
DEMO = {"RECIPE": "demo"}
TINY = {
    "PREPARE_DATASET": "stdlib",
    "PREPARE_TOTAL_TOKENS": "20000",
    "PREPARE_VAL_TOKENS": "2000",
    "PREPARE_OUT_DIR": "tiny",
    "MODEL_CONTEXT_LENGTH": "32",
    "MODEL_NUM_LAYERS": "1",
    "MODEL_EMBD_SIZE": "16",
    "MODEL_NUM_HEADS": "2",
    "TRAIN_RUN_NAME": "tiny",
    "TRAIN_TOKENS_PER_STEP": "128",
    "TRAIN_MAX_STEPS": "4",
    "TRAIN_COMPILE": "false",
}


@dataclass(frozen=True)
class Engine:
    """A person at a shell in a checkout, on a machine with Docker and without a GPU."""

    folder: Path
    variables: dict[str, str]

    def run(
        self, *words: str, code: int = 0, variables: Mapping[str, str] = NONE
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, with these variables besides; `code` is the exit code it must have."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def docker(self, *words: str, variables: Mapping[str, str] = NONE) -> str:
        """Run `docker …`, which must work, and return what it prints."""
        return self.run("docker", *words, variables=variables).stdout

    def job(
        self,
        *words: str,
        code: int = 0,
        options: tuple[str, ...] = (),
        variables: Mapping[str, str] = NONE,
    ) -> str:
        """Run `docker compose run --rm [options] words` and return everything it prints."""
        command = ("docker", "compose", "run", "--rm", "--no-TTY", *options, *words)
        done = self.run(*command, code=code, variables=variables)
        return done.stdout + done.stderr

    def inside(
        self, script: str, service: str = "report", variables: Mapping[str, str] = NONE
    ) -> str:
        """Run a shell script in a service's container and return what it prints."""
        options = ("--entrypoint", "sh")
        return self.job(service, "-c", script, options=options, variables=variables)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, f"these tests need a container engine: {found.stderr}"
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    # What builds the image here stays; what the developer has chosen for containers does not.
    chosen = {*VARIABLES, *containers.VARIABLES} - {"BASE_IMAGE", "TORCH", "TORCH_INDEX"}
    variables = {name: value for name, value in os.environ.items() if name not in chosen}
    variables |= {
        "COMPOSE_PROJECT_NAME": PROJECT,
        "COMPOSE_FILE": "compose.yaml:docker/compose.cpu.yaml",
        "IMAGE": PROJECT,
    }
    engine = Engine(folder, variables)
    down = ("compose", "--profile", "*", "down", "--volumes", "--remove-orphans")
    engine.docker(*down)
    engine.docker("compose", "build")
    yield engine
    engine.docker(*down)


@pytest.fixture
def dotenv(engine: Engine) -> Iterator[Path]:
    """The checkout's .env, gone after the test."""
    path = engine.folder / ".env"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def demo(engine: Engine) -> Engine:
    """An engine whose volume has the demo's data and its run, trained to the end."""
    engine.job("prepare", variables=DEMO)
    engine.job("train", variables=DEMO)
    return engine


@pytest.fixture(scope="session")
def tiny(engine: Engine) -> Engine:
    """An engine whose volume has a tiny dataset."""
    engine.job("prepare", variables=TINY)
    return engine
