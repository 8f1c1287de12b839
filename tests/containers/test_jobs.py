"""The commands in their containers: from text to a model and its picture, stopped and continued."""

import json
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.containers.conftest import DEMO, NONE, PROJECT, TINY, Engine
from tests.newcomer import REPOSITORY

pytestmark = pytest.mark.container


def metrics(engine: Engine, run: str) -> list[dict[str, float]]:
    lines = engine.inside(f"cat /data/runs/{run}/metrics.jsonl").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def assert_whole(engine: Engine, dataset: str) -> None:
    """Every shard of the dataset has the hash that the manifest says."""
    shards = int(engine.inside(f"ls /data/{dataset}/*.bin | wc -l").split()[-1])
    assert engine.job("inspect", dataset, "--verify").count("SHA-256 matches") == shards > 0


def saved_by(printed: str) -> str:
    """The checkpoint that a stopped train says it has saved."""
    match = re.search(r"stopped: /data/(runs/\S+/checkpoints/step-\d+);", printed)
    assert match, printed
    return match[1]


def test_from_text_to_a_model_that_writes_and_its_picture(demo: Engine, tmp_path: Path) -> None:
    assert "class " in demo.job("sample", variables=DEMO)
    assert "perplexity" in demo.job("evaluate", variables=DEMO)
    assert_whole(demo, "demo")
    demo.job("report", variables=DEMO)
    records = metrics(demo, "demo")
    assert [record["step"] for record in records] == list(range(80))
    assert records[-1]["val_loss"] < 5 < records[0]["train_loss"]

    copied = "docker compose run --rm -T --entrypoint tar report -C /data/runs -c demo | tar -x"
    assert copied.replace("demo", "fineweb20M") in (REPOSITORY / "docs/containers.md").read_text()
    demo.run("sh", "-c", f"{copied} -C {tmp_path}")
    report = tmp_path / "demo" / "report"
    assert (report / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "</html>" in (report / "report.html").read_text()
    # Compiled inside, with what the image has, to where it survives.
    assert int(demo.inside("find /data/cache/inductor -name '*.so' | wc -l")) > 0


@contextmanager
def in_background(
    engine: Engine, *words: str, variables: Mapping[str, str] = NONE
) -> Iterator[str]:
    """The container of a job that runs; it is stopped and removed in the end."""
    run = ("docker", "compose", "run", "--detach", "--no-TTY", *words)
    container = engine.run(*run, variables=variables).stdout.split()[-1]
    try:
        yield container
    finally:
        engine.docker("rm", "--force", container)


def wait_for(engine: Engine, container: str, text: str) -> None:
    """Return when the container prints a line with `text`."""
    command = ("timeout", "300", "docker", "logs", "--follow", container)
    with subprocess.Popen(
        command, env=engine.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as logs:
        assert logs.stdout is not None
        printed = ""
        for line in logs.stdout:
            printed += line
            if text in line:
                logs.kill()
                return
    pytest.fail(f"{text!r} did not come: {printed}")


def stopped(engine: Engine, container: str) -> tuple[int, str]:
    """`docker stop`: the exit code, and what was printed."""
    engine.docker("stop", container)
    code = engine.docker("inspect", "--format", "{{.State.ExitCode}}", container)
    done = engine.run("docker", "logs", container)
    return int(code), done.stdout + done.stderr


def test_docker_stop_saves_and_the_next_train_continues(tiny: Engine) -> None:
    endless = TINY | {"TRAIN_RUN_NAME": "stopped", "TRAIN_MAX_STEPS": "1000000"}
    with in_background(tiny, "train", variables=endless) as container:
        wait_for(tiny, container, "step:20/")
        code, printed = stopped(tiny, container)
    assert code == 128 + signal.SIGTERM
    assert saved_by(printed).startswith("runs/stopped/")
    done = len(metrics(tiny, "stopped"))
    printed = tiny.job("train", "--max-steps", str(done + 2), variables=endless)
    assert f"continues at step {done}" in printed
    assert len(metrics(tiny, "stopped")) == done + 2


def test_two_processes_need_no_network_and_stop_together(tiny: Engine) -> None:
    endless = TINY | {"TRAIN_RUN_NAME": "pair", "TRAIN_MAX_STEPS": "1000000"}
    pair = endless | {"TRAIN_PROCESSES": "2"}
    with in_background(tiny, "train", variables=pair) as container:
        wait_for(tiny, container, "step:20/")
        code, printed = stopped(tiny, container)
    assert code == 128 + signal.SIGTERM, printed
    assert "2 x CPU" in printed
    assert saved_by(printed).startswith("runs/pair/")
    done = len(metrics(tiny, "pair"))
    assert f"continues at step {done}" in tiny.job(
        "train", "--max-steps", str(done + 2), variables=endless
    )


def test_docker_stop_ends_prepare_and_the_next_one_completes(engine: Engine) -> None:
    engine.inside("""seq 3000000 | sed 's/.*/{"text": "& after &"}/' > /data/long.jsonl""")
    text = {"PREPARE_DATASET": "/data/long.jsonl", "PREPARE_TOTAL_TOKENS": "all"}
    text |= {"PREPARE_OUT_DIR": "long", "PREPARE_WORKERS": "1", "PREPARE_SHARD_SIZE": "1000000"}
    with in_background(engine, "prepare", variables=text) as container:
        until_a_shard = "until [ -e /data/long/long_000001.bin ]; do sleep 0.1; done"
        engine.docker("exec", container, "sh", "-c", until_a_shard)
        code, printed = stopped(engine, container)
    assert code == 128 + signal.SIGTERM, printed
    engine.job("prepare", variables=text)
    assert_whole(engine, "long")


def test_ctrl_c_saves_and_gives_130(tiny: Engine) -> None:
    endless = TINY | {"TRAIN_RUN_NAME": "interrupted", "TRAIN_MAX_STEPS": "1000000"}
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        ["docker", "compose", "run", "--rm", "train"],
        cwd=tiny.folder,
        env=tiny.variables | endless,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    printed = ""
    with os.fdopen(keyboard, "r+b", buffering=0) as screen:
        # A terminal gets no more than a line a second.
        while not re.search(r"step:([5-9]|\d\d)", printed):
            assert select.select([screen], [], [], 120)[0], printed
            printed += screen.read(65536).decode()
        screen.write(b"\x03")
        code = process.wait(timeout=300)
        printed += screen.read(65536).decode()
    assert code == 128 + signal.SIGINT, printed
    assert saved_by(printed).startswith("runs/interrupted/")


def test_two_stops_at_once_are_one(tiny: Engine) -> None:
    endless = TINY | {"TRAIN_RUN_NAME": "twice", "TRAIN_MAX_STEPS": "1000000"}
    with in_background(tiny, "train", variables=endless) as container:
        wait_for(tiny, container, "step:20/")
        tiny.docker("kill", "--signal", "INT", container)
        code, printed = stopped(tiny, container)
    assert code == 128 + signal.SIGINT, printed
    assert saved_by(printed).startswith("runs/twice/")


def test_up_starts_stop_saves_and_up_continues(tiny: Engine) -> None:
    endless = TINY | {"TRAIN_RUN_NAME": "up", "TRAIN_MAX_STEPS": "1000000"}
    for reached in ("step:20/", "continues at step"):
        tiny.docker("compose", "up", "--detach", "train", variables=endless)
        container = tiny.docker("compose", "ps", "--quiet", "train", variables=endless).strip()
        wait_for(tiny, container, reached)
        tiny.docker("compose", "stop", "train", variables=endless)
        state = tiny.docker("compose", "ps", "--all", "--format", "json", "train")
        assert json.loads(state)["ExitCode"] == 128 + signal.SIGTERM
    tiny.docker("compose", "rm", "--force", "train")


def test_a_run_without_data_says_what_to_do(engine: Engine) -> None:
    printed = engine.job("train", "--dataset-dir", "nowhere", code=2)
    assert "run `docker compose run --rm prepare` with the same settings" in printed
    assert "Traceback" not in printed


def test_doctor_sees_a_volume_that_cannot_be_written(tiny: Engine) -> None:
    printed = tiny.job("doctor", variables=TINY)
    assert "warn  device        no GPU: trains on the CPU" in printed
    assert "pass  data folder   /data can be written by user 10001" in printed
    assert " 0 failed" in printed
    read_only = ("--volume", f"{PROJECT}_data:/data:ro")
    printed = tiny.job("doctor", options=read_only, variables=TINY, code=1)
    assert "fail  data folder   no permission to write or read /data (Read-only file" in printed
    assert "Traceback" not in printed


@contextmanager
def served(
    engine: Engine, service: str, port: int, variables: Mapping[str, str], inside: int = 0
) -> Iterator[Callable[..., str]]:
    """Start a service, which must listen on loopback only, and yield a way to ask it for a path."""
    engine.docker("compose", "up", "--detach", service, variables=variables)
    try:
        address = engine.docker(
            "compose", "port", service, str(inside or port), variables=variables
        )
        assert address.strip() == f"127.0.0.1:{port}"

        def ask(path: str, *options: str) -> str:
            patient = ("--retry", "60", "--retry-all-errors", "--retry-delay", "1")
            curl = ("curl", "--silent", "--show-error", "--fail", *patient, *options)
            return engine.run(*curl, f"http://localhost:{port}/{path}").stdout

        yield ask
    finally:
        engine.docker("compose", "rm", "--stop", "--force", service)


def assert_stops(engine: Engine, service: str) -> None:
    """`docker stop` ends the service's process in time."""
    container = engine.docker("compose", "ps", "--quiet", service).strip()
    code, printed = stopped(engine, container)
    assert code == 128 + signal.SIGTERM, printed


def test_tensorboard_answers_on_this_machine_only(tiny: Engine) -> None:
    tiny.job("train", variables=TINY)
    with served(tiny, "tensorboard", 16006, {"TENSORBOARD_PORT": "16006"}, inside=6006) as ask:
        runs = json.loads(ask("data/plugin/scalars/tags"))
        assert "loss/train" in runs["tiny/tensorboard"]


def test_up_serves_the_report_on_this_machine_only_and_run_writes_it(tiny: Engine) -> None:
    tiny.job("train", variables=TINY)
    assert tiny.job("report", "tiny").startswith("/data/runs/tiny/report/report.html\n")
    with served(tiny, "report", 18001, {"REPORT_PORT": "18001"}) as ask:
        assert "<title>tiny</title>" in ask("?run=tiny")
        assert_stops(tiny, "report")


def test_the_playground_answers_on_this_machine_only_and_cannot_write(tiny: Engine) -> None:
    port = {"PLAYGROUND_PORT": "18000"}
    tiny.job("train", variables=TINY)
    with served(tiny, "playground", 18000, TINY | port) as ask:
        assert "<title>Playground" in ask("")
        wanted = json.dumps({"run": "tiny", "step": 4, "prompt": "import ", "max_tokens": 5})
        text = ask("api/generate", "--header", "Content-Type: application/json", "--data", wanted)
        assert json.loads(text.splitlines()[-1])["state"] == "ended"
        writing = ("compose", "exec", "-T", "playground", "touch", "/data/x")
        printed = tiny.run("docker", *writing, code=1, variables=port).stderr
        assert "Read-only file system" in printed
        assert_stops(tiny, "playground")


def test_the_tear_down_of_the_docs_leaves_nothing(engine: Engine) -> None:
    command = "docker compose --profile '*' down -v --remove-orphans"
    assert command in (REPOSITORY / "docs" / "cloud.md").read_text()
    project = f"{PROJECT}-gone"
    own = {"COMPOSE_PROJECT_NAME": project, "TENSORBOARD_PORT": "16007"}
    engine.docker("compose", "run", "--detach", "report", variables=own)
    engine.docker("compose", "up", "--detach", "tensorboard", variables=own)
    label = ("--filter", f"label=com.docker.compose.project={project}", "--quiet")
    assert len(engine.docker("ps", "--all", *label).split()) == 2
    assert engine.docker("volume", "ls", *label).split() == [f"{project}_data"]
    engine.run("sh", "-c", command, variables=own)
    for kind in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
        assert engine.docker(*kind, *label) == ""
