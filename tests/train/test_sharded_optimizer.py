"""Optimizer state that is divided among ranks: the same run, and the same checkpoints."""

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from app.distributed.world import World
from app.model.gpt import GPT, GPTConfig
from app.settings.train import TrainSettings
from app.train.micro_batch import estimate_memory
from app.train.optimizer import Optimizers, build_optimizers
from app.train.sharded_optimizer import ShardedOptimizers
from tests.distributed.ranks import Ranks
from tests.train.processes import Start, Unbroken, assert_same_run, losses
from tests.train.tiny_model import CPU

pytestmark = pytest.mark.processes

SHAPE = GPTConfig(32, 50257, 3, 64, 2)
KEPT = {"TRAIN_KEEP_CHECKPOINTS": 9}
FOUR = KEPT | {"TRAIN_PROCESSES": 4, "TRAIN_MICRO_BATCH_SIZE": 2, "TRAIN_SHARD_OPTIMIZER": True}


@dataclass
class Share:
    """Bytes of optimizer state: of this rank, as the estimate counts them, and of all ranks."""

    own: int
    estimated: int
    total: int


def make_two_updates(
    cfg: TrainSettings, world: World, *, skip_first: bool = False
) -> tuple[GPT, Optimizers]:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    optimizers = build_optimizers(model, cfg)
    if world.size > 1:
        optimizers = ShardedOptimizers(optimizers)
    if skip_first:
        optimizers.skip_step()
    for step in range(2):
        optimizers.begin_step(step, 1e-2)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers.step()
    return model, optimizers


def compare_with_undivided(rank: int, size: int, optimizer: Literal["muon", "adamw"]) -> Share:
    """Assert that weights and gathered state equal those of undivided optimizers."""
    cfg = TrainSettings(
        optimizer=optimizer,
        compile=False,
        shard_optimizer=True,
        embedding_learning_rate=7.2e-3,
        momentum_warmup_steps=4,
        muon_split=True,
    )
    whole, all_of_it = make_two_updates(cfg, World())
    model, optimizers = make_two_updates(cfg, World(rank, size, size), skip_first=True)
    torch.testing.assert_close(model.state_dict(), whole.state_dict())
    expected = dict(all_of_it.named_state(whole))
    gathered = {name: value.clone() for name, value in optimizers.named_state(model)}
    torch.testing.assert_close(gathered, expected)
    own = [
        value for parameter in model.parameters() for value in optimizers.state(parameter).values()
    ]
    alone, divided = (
        estimate_memory(cfg, SHAPE, CPU, world_size).fixed_bytes for world_size in (1, size)
    )
    return Share(
        own=sum(value.nbytes for value in own),
        estimated=8 * model.num_parameters() - (alone - divided),
        total=sum(value.nbytes for value in expected.values()),
    )


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_each_rank_keeps_its_share_and_all_of_it_can_be_saved(ranks: Ranks, optimizer: str) -> None:
    shares = ranks.run(compare_with_undivided, optimizer)
    assert sum(share.own for share in shares) == shares[0].total
    for share in shares:
        assert 0 < share.own <= share.estimated


@pytest.mark.slow
@pytest.mark.parametrize("changes", ({}, {"TRAIN_OPTIMIZER": "adamw"}), ids=("muon", "adamw"))
def test_a_divided_state_takes_the_same_steps(unbroken: Unbroken, changes: dict[str, str]) -> None:
    alone = losses(unbroken(**KEPT, **changes))
    torch.testing.assert_close(losses(unbroken(**FOUR, **changes)), alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_a_qwen3_as_one_does(start: Start, unbroken: Unbroken) -> None:
    qwen3 = {"MODEL_ARCHITECTURE": "qwen3", "MODEL_HEAD_DIM": 16, "TRAIN_MAX_STEPS": 6}
    divided = start(**qwen3, TRAIN_PROCESSES=2, TRAIN_SHARD_OPTIMIZER=True)
    code, output = divided.end()
    assert code == 0, output
    assert "Warning" not in output
    alone = losses(unbroken(**qwen3))
    torch.testing.assert_close(losses(divided.run_dir), alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_four_shares_continues_in_one_process_and_the_other_way_round(
    start: Start, unbroken: Unbroken, data_dir: Path
) -> None:
    expected = losses(unbroken(**KEPT))
    for name, before, after in (("four-one", FOUR, KEPT), ("one-four", KEPT, FOUR)):
        run_dir = data_dir / "runs" / name
        shutil.copytree(unbroken(**before), run_dir)
        for step in (8, 10):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{step:06d}")
        continued = start(**after, TRAIN_RUN_NAME=name)
        code, output = continued.end()
        assert code == 0, output
        assert "continues at step 4" in output
        torch.testing.assert_close(losses(run_dir), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
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
