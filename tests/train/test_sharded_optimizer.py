"""Optimizer state shared out to real processes: the same run, and the same checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.processes import (
    CHECKOUT,
    Start,
    Unbroken,
    assert_same_run,
    losses,
    run_to_end,
)

pytestmark = pytest.mark.processes

# Every rank's share of the state, and what the first one gets to save.
SHARES = """
import json, os, sys
import torch
from app.model.gpt import GPT, GPTConfig
from app.hardware.device import Device
from app.train.micro_batch import estimate_memory
from app.settings.train import TrainSettings
from app.train.optimizer import build_optimizers
from app.distributed.world import init_world
from app.train.sharded_optimizer import ShardedOptimizers

def stepped(sharded):
    torch.manual_seed(0)
    model = GPT(config)
    optimizers = build_optimizers(model, TrainSettings(optimizer=sys.argv[1]))
    optimizers = ShardedOptimizers(*optimizers.parts) if sharded else optimizers
    optimizers.set_learning_rate(1e-2)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers.step()
    return model, optimizers

config = GPTConfig(32, 50257, 3, 64, 2)
cfg = TrainSettings(compile=False, shard_optimizer=True)
device = Device(torch.device("cpu"), "CPU", "float32", True, None)
with init_world(torch.device("cpu"), 60) as ranks:
    whole, all_of_it = stepped(False)
    model, optimizers = stepped(True)
    for one, other in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    expected = dict(all_of_it.named_state(whole))
    found = {name: value.clone() for name, value in optimizers.named_state(model)}
    torch.testing.assert_close(found, expected)
    kept = sum(
        4 * value.numel() for one in model.parameters() for value in optimizers.state(one).values()
    )
    need, of_shards = (
        estimate_memory(cfg, config, device, shards).fixed_bytes for shards in (1, ranks.size)
    )
    counted = 8 * model.num_parameters() - (need - of_shards)
    total = sum(4 * value.numel() for value in expected.values())
    # In one call, or another process may write between the text and its end of line.
    line = json.dumps({"kept": kept, "counted": counted, "total": total}) + "\\n"
    os.write(sys.stdout.fileno(), line.encode())
"""


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_each_process_keeps_its_share_and_the_first_can_save_all(optimizer: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    ended = subprocess.run(
        [sys.executable, *launcher, "--no-python", sys.executable, "-c", SHARES, optimizer],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    shares = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(shares) == 3
    assert sum(share["kept"] for share in shares) == shares[0]["total"]
    for share in shares:
        assert share["kept"] <= share["counted"]


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_shared_out_state_takes_the_same_steps(unbroken: Unbroken, optimizer: str) -> None:
    shared = unbroken(
        TRAIN_OPTIMIZER=optimizer,
        TRAIN_PROCESSES=4,
        TRAIN_MICRO_BATCH_SIZE=2,
        TRAIN_SHARD_OPTIMIZER=True,
    )
    alone = unbroken(TRAIN_OPTIMIZER=optimizer)
    torch.testing.assert_close(losses(shared), losses(alone), rtol=0, atol=1e-5)


def test_a_checkpoint_of_four_shares_continues_in_one_process_and_the_reverse(
    start: Start, unbroken: Unbroken, data_dir: Path
) -> None:
    kept = {"TRAIN_KEEP_CHECKPOINTS": 9}
    four = {"TRAIN_PROCESSES": 4, "TRAIN_MICRO_BATCH_SIZE": 2, "TRAIN_SHARD_OPTIMIZER": True}
    expected = losses(unbroken())
    for name, before, after in (("four-one", four, {}), ("one-four", {}, four)):
        run_dir = data_dir / "runs" / name
        shutil.copytree(unbroken(**before, **kept), run_dir)
        for step in (8, 10):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{step:06d}")
        continued = start(**after, **kept, TRAIN_RUN_NAME=name)
        code, output = continued.end()
        assert code == 0, output
        assert "continues at step 4" in output
        torch.testing.assert_close(losses(run_dir), expected, rtol=0, atol=1e-5)


def test_after_the_death_of_a_rank_its_share_comes_from_the_checkpoint(
    start: Start, unbroken: Unbroken
) -> None:
    settings = {"TRAIN_PROCESSES": 2, "TRAIN_SHARD_OPTIMIZER": True}
    broken = start(**settings)
    broken.wait_for("step:5/")
    os.kill(broken.workers()[1], signal.SIGKILL)
    code, output = broken.end()
    assert code == 0, output
    assert "continues at step 4" in output
    assert_same_run(broken.run_dir, unbroken(**settings))


def test_all_save_together_when_only_the_first_is_interrupted(
    start: Start, unbroken: Unbroken
) -> None:
    """The first rank alone writes samples, and leaves those of the last step undone."""
    settings = {"TRAIN_PROCESSES": 2, "TRAIN_SHARD_OPTIMIZER": True, "TRAIN_SAMPLE_EVERY": 10}
    stopped = start(**settings, SAMPLE_MAX_TOKENS=1_000_000)
    stopped.signal_at("step:9/", signal.SIGTERM)
    code, output = stopped.end()
    assert code == 143, output
    assert output.count("stopped: ") == 1
    continued = run_to_end(start, **settings)
    assert_same_run(continued.run_dir, unbroken(**settings))
