"""Sweeps of real training processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.errors import ExitCode
from app.tools.sweep.plan import PlannedRun, plan_sweep
from app.tools.sweep.processes import train_all
from tests.train.conftest import rewrite_checkpoint
from tests.train.processes import TINY, Watched

SWEEP = TINY | {"TRAIN_MAX_STEPS": "4", "TRAIN_CHECKPOINT_EVERY": "2", "TRAIN_SAMPLE_EVERY": "0"}
SEEDS = "train.seed=0,1,2"


def start(*sets: str) -> Watched:
    words = [word for it in sets for word in ("--set", it)]
    return Watched(
        [sys.executable, "-m", "app", "sweep", *words],
        env=os.environ | SWEEP | {"DATADIR": "data"},
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ruin(weights: dict[str, Tensor]) -> None:
    weights["transformer.ln_f.weight"][3] = torch.nan


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_sweep_continues_and_goes_on_after_a_run_that_diverges(data_dir: Path) -> None:
    killed = start(SEEDS)
    killed.wait_for("run 2 of 3: run-seed1")
    killed.wait_for("after 2 steps: saved data/runs/run-seed1")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    (done,) = json.loads(Path("data/sweeps/run/sweep.json").read_text())["runs"]
    assert (done["run"], done["status"]) == ("run-seed0", "complete")
    before = Path("data/runs/run-seed0/metrics.jsonl").read_bytes()
    # Of the interrupted run, so that its next loss is not finite.
    for saved in Path("data/runs/run-seed1/checkpoints").iterdir():
        rewrite_checkpoint(saved, "model.safetensors", ruin)
    code, printed = start(SEEDS).end()
    assert code == ExitCode.DONE, printed
    assert "data/sweeps/run: 3 runs, 2 to train" in printed
    assert "run-seed0: " not in printed, "a complete run starts again"
    assert "data/runs/run-seed1: continues at step " in printed
    assert "run 3 of 3: run-seed2" in printed
    assert printed.count("warning: DATADIR ") == 1
    written = json.loads(Path("data/sweeps/run/sweep.json").read_text())
    assert [it["status"] for it in written["runs"]] == ["complete", "diverged", "complete"]
    assert Path("data/runs/run-seed0/metrics.jsonl").read_bytes() == before
    for it in written["runs"][::2]:
        lines = (Path("data/runs") / it["run"] / "metrics.jsonl").read_text().splitlines()
        assert it["held_out_loss"] == json.loads(lines[-1])["val_loss"]
    files = {path.name for path in Path("data/sweeps/run").iterdir()} - {".lock"}
    assert files == {"sweep.json", "sweep.csv", "sweep.png", "sweep-dark.png"}


@pytest.mark.slow
@pytest.mark.processes
def test_a_signal_reaches_the_run_which_saves_and_the_sweep_continues(data_dir: Path) -> None:
    stopped = start("train.seed=0,1")
    stopped.wait_for("step:1/4")
    stopped.send_signal(signal.SIGTERM)
    code, printed = stopped.end()
    assert code == ExitCode.SIGTERM, printed
    assert "the same command continues" in printed
    assert "run 2 of 2" not in printed
    code, printed = start("train.seed=0,1").end()
    assert code == ExitCode.DONE, printed
    assert "data/runs/run-seed0: continues at step " in printed or "is finished" in printed
    before, _, following = printed.partition("next: ")
    assert "best: run-seed" in before
    assert "next: " not in following


def planned() -> list[PlannedRun]:
    flags = {name: text for name, text in SWEEP.items() if not name.startswith("SAMPLE_")}
    return plan_sweep(flags, [SEEDS])[1]


@pytest.mark.slow
@pytest.mark.processes
def test_runs_train_side_by_side_each_on_a_device_of_its_own(
    data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[tuple[str, int]] = []
    runs = planned()
    code = train_all(runs, 3, ["0", "1"], Path(), lambda *it: ended.append((it[0].name, it[1])))
    assert code == 0
    assert sorted(ended) == [(run.name, 0) for run in runs]
    printed = capfd.readouterr().out
    assert "run 1 of 3: run-seed0 on GPU 0; it prints to run-seed0.log" in printed
    assert "run 2 of 3: run-seed1 on GPU 1; it prints to run-seed1.log" in printed
    assert "step:" not in printed
    assert all("step:3/4" in Path(f"{run.name}.log").read_text() for run in runs)


@pytest.mark.parametrize("places", ([None], ["0", "1"]))
def test_a_run_that_fails_ends_the_sweep_with_its_exit_code(
    data_dir: Path, places: list[str | None], capfd: pytest.CaptureFixture[str]
) -> None:
    runs = planned()
    for run in runs:
        run.flags["TRAIN_DATASET_DIR"] = "gone"
    ended: list[str] = []
    code = train_all(runs, 3, places, Path(), lambda run, _: ended.append(run.name))
    assert (code, ended) == (ExitCode.USER, [])
    printed = capfd.readouterr()
    output = "".join([printed.err, *(log.read_text() for log in Path().glob("*.log"))])
    assert "error: no dataset in data/gone" in output
    assert "error: the run run-seed" in printed.err
    assert "has failed with exit code 2" in printed.err
    assert "run-seed2" not in printed.out


def test_a_child_that_is_no_run_may_end_meanwhile(data_dir: Path) -> None:
    run = planned()[0]
    run.flags["TRAIN_DATASET_DIR"] = "gone"
    with subprocess.Popen(["true"]):
        assert train_all([run], 1, [None], Path(), lambda *_: None) == ExitCode.USER
