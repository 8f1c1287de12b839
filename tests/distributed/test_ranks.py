"""Real processes that train together over gloo: the same run, whichever of them dies."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from app.data.hellaswag import read_questions
from app.inference.hellaswag import HellaSwag
from app.runs.checkpoints import latest_checkpoint
from app.runs.load import load_model
from app.signals import SAME_REQUEST_SECONDS
from tests.inference.hellaswag_questions import FILE
from tests.inference.test_hellaswag import CPU
from tests.python_process import run_python
from tests.train.processes import (
    TRAIN,
    Process,
    Start,
    Unbroken,
    assert_same_run,
    losses,
    measured,
    run_to_end,
)

pytestmark = pytest.mark.processes


def is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_steps(unbroken: Unbroken) -> None:
    alone = unbroken()
    expected = [line["val_loss"] for line in measured(alone) if "val_loss" in line]
    for processes, micro_batch_size in ((1, 8), (2, 1), (2, 4), (4, 2)):
        run = unbroken(TRAIN_PROCESSES=processes, TRAIN_MICRO_BATCH_SIZE=micro_batch_size)
        torch.testing.assert_close(losses(run), losses(alone), rtol=0, atol=1e-5)
        held_out = [line["val_loss"] for line in measured(run) if "val_loss" in line]
        assert held_out == pytest.approx(expected, abs=1e-5)


def test_hellaswag_of_two_processes_is_that_of_the_model_they_save(start: Start) -> None:
    settings = {"TRAIN_HELLASWAG_EVERY": 5, "TRAIN_HELLASWAG_FILE": FILE, "TRAIN_MAX_STEPS": 7}
    run = run_to_end(start, TRAIN_PROCESSES=2, **settings).run_dir
    found = {line["step"]: line["hellaswag"] for line in measured(run) if "hellaswag" in line}
    assert list(found) == [4, 6]
    model = load_model(latest_checkpoint(run), CPU)
    (counts,) = HellaSwag(read_questions(FILE), 32, 10_000).correct(model, CPU)
    assert found[6] == counts[0].item() / 8


@pytest.mark.slow
@pytest.mark.parametrize("rank", (0, 3))
def test_a_run_that_lost_a_rank_equals_an_unbroken_one(
    data_dir: Path, unbroken: Unbroken, rank: int
) -> None:
    # TRAIN_RESUME=never applies to the first start only.
    command = (*TRAIN, "--resume", "never")
    broken = Process(data_dir, command, TRAIN_PROCESSES=4, TRAIN_MICRO_BATCH_SIZE=2)
    broken.wait_for("step:5/")
    os.kill(broken.workers()[rank], signal.SIGKILL)
    code, output = broken.end()
    assert code == 0, output
    assert "a process has died (SIGKILL): restarting all processes from the last" in output
    assert "continues at step 4" in output
    assert "Traceback" not in output
    whole = unbroken(TRAIN_PROCESSES=4, TRAIN_MICRO_BATCH_SIZE=2)
    assert_same_run(broken.run_dir, whole)


@pytest.mark.slow
def test_a_rank_that_hangs_is_lost_after_the_timeout(start: Start, unbroken: Unbroken) -> None:
    # TRAIN_RESUME=never applies to the first start only.
    broken = start(
        TRAIN_PROCESSES=2,
        TRAIN_MICRO_BATCH_SIZE=4,
        TRAIN_RANK_TIMEOUT_SECONDS=15,
        TRAIN_RESUME="never",
    )
    broken.wait_for("step:5/")
    os.kill(broken.workers()[1], signal.SIGSTOP)
    code, output = broken.end()
    assert code == 0, output
    assert "rank 0: another rank has not answered for 15 s" in output, output
    assert_same_run(broken.run_dir, unbroken(TRAIN_PROCESSES=2, TRAIN_MICRO_BATCH_SIZE=4))


@pytest.mark.slow
def test_restarts_are_limited_and_the_exit_code_is_that_of_the_first_failure(start: Start) -> None:
    broken = start(TRAIN_PROCESSES=2, TRAIN_MAX_RESTARTS=0)
    broken.wait_for("step:1/")
    os.kill(broken.workers()[1], signal.SIGKILL)
    code, output = broken.end()
    assert code == 128 + signal.SIGKILL, output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)), ids=["SIGTERM", "SIGINT"]
)
def test_a_run_of_four_processes_is_stopped_and_continued_by_two(
    start: Start, unbroken: Unbroken, number: signal.Signals, code: int
) -> None:
    stopped = start(TRAIN_PROCESSES=4, TRAIN_MICRO_BATCH_SIZE=2)
    stopped.signal_at("step:1/", number)
    exit_code, output = stopped.end()
    assert exit_code == code, output
    assert output.count("stopped: ") == 1
    assert "Traceback" not in output
    continued = run_to_end(start, TRAIN_PROCESSES=2, TRAIN_MICRO_BATCH_SIZE=2)
    torch.testing.assert_close(losses(continued.run_dir), losses(unbroken()), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_second_signal_ends_even_a_hanging_process(start: Start) -> None:
    broken = start(TRAIN_PROCESSES=2)
    broken.wait_for("step:1/")
    os.kill(broken.workers()[1], signal.SIGSTOP)
    broken.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        broken.process.wait(SAME_REQUEST_SECONDS + 1)
    broken.process.send_signal(signal.SIGTERM)
    code, _ = broken.end()
    assert code == 143


LOSES_THE_OTHERS = """
import torch
from torch import distributed
from app.distributed.world import init_world
from app.errors import RankLostError
try:
    with init_world(torch.device("cpu"), 60):
        raise distributed.DistBackendError("NCCL error: unhandled system error, No space left")
except RankLostError as error:
    print(error)
"""


def run_as_only_rank(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program as the only process of a launcher."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return run_python(program, **alone, **address)


def test_an_error_of_the_network_is_explained() -> None:
    ended = run_as_only_rank(LOSES_THE_OTHERS)
    assert ended.returncode == 0, ended.stderr
    assert "rank 0: lost contact with the other processes: NCCL error: unhandled" in ended.stdout
    assert "NCCL_DEBUG=INFO" in ended.stdout


STOPS_WHERE_EXCEPTIONS_ARE_DROPPED = """
import os, signal, sys, weakref
import torch
from app.cli.process import run_as_process
from app.distributed.world import init_world

def train(_arguments):
    with init_world(torch.device("cpu"), 60):
        thing = type("Thing", (), {})()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        return 0

run_as_process(train)
"""


def test_a_stop_works_where_python_drops_exceptions() -> None:
    ended = run_as_only_rank(STOPS_WHERE_EXCEPTIONS_ARE_DROPPED)
    assert (ended.returncode, ended.stderr) == (143, "stopped: by SIGTERM\n")


@pytest.mark.slow
def test_a_wrong_setting_is_reported_once(start: Start) -> None:
    code, output = start(TRAIN_PROCESSES=2, TRAIN_DATASET_DIR="missing").end()
    assert code == 2, output
    assert output.count("error:") == 1
    code, output = start(TRAIN_PROCESSES=3, DATADIR="data").end()
    assert output.count("warning: DATADIR ") == 1
    assert code == 2, output
    assert "cannot be divided evenly among 3 processes" in output
    assert "set TRAIN_PROCESSES to one of 1, 2" in output


@pytest.mark.slow
@pytest.mark.parametrize("has_steps", (True, False))
def test_the_processes_of_a_killed_launcher_stop(start: Start, has_steps: bool) -> None:
    killed = start(TRAIN_PROCESSES=2, TRAIN_MAX_STEPS=2000)
    if has_steps:
        killed.wait_for("step:1/")
    # Without, they are still importing torch.
    while len(workers := killed.workers()) < 2:
        os.sched_yield()
    assert sorted(workers) == [0, 1]
    killed.process.kill()
    code, _ = killed.end()
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 300
    while any(map(is_alive, workers.values())) and time.monotonic() < deadline:
        os.sched_yield()
    assert not any(map(is_alive, workers.values()))
    assert (killed.run_dir / "checkpoints").exists() == has_steps


@pytest.mark.slow
def test_processes_that_nobody_reads_are_stopped_with_a_checkpoint(start: Start) -> None:
    """Ctrl-C ends `tee` and whatever else the output goes to as well."""
    stopped = start(TRAIN_PROCESSES=2, TRAIN_MAX_STEPS=2000, TRAIN_VAL_EVERY=0)
    stopped.wait_for("step:1/")
    for stream in (stopped.process.stdout, stopped.process.stderr):
        assert stream is not None
        stream.close()
    metrics = stopped.run_dir / "metrics.jsonl"
    while metrics.read_bytes().count(b"\n") < 5:
        os.sched_yield()
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.process.wait(timeout=300) == 130
    (last,) = sorted((stopped.run_dir / "checkpoints").iterdir())[-1:]
    assert last.name == f"step-{len(measured(stopped.run_dir)):06d}"
