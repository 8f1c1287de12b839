"""The collectives of one rank and of several, and that all ranks of a trainer make the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from app.distributed.world import World
from app.errors import Stopped
from app.hardware.device import select_device
from app.runs.checkpoints import latest_checkpoint
from app.runs.folder import RunFolder
from app.settings.sources import load_settings
from app.train.start import Start, open_training_data, plan_start
from app.train.trainer import Trainer
from tests.distributed.ranks import Ranks
from tests.train.processes import TINY, assert_same_run
from tests.train.test_trainer_steps import LAST_STEP, SMALL, StopAtPoll

T = TypeVar("T")


def test_one_rank_needs_no_other() -> None:
    world, ones = World(), torch.ones(3)
    assert world.is_rank_zero
    assert [world.any(flag) for flag in (True, False)] == [True, False]
    assert world.broadcast("own") == "own"
    assert [world.first(value) for value in (None, "own")] == [None, "own"]
    assert world.sum(ones) is ones
    assert ones.tolist() == [1, 1, 1]
    world.barrier()


def collectives(rank: int, size: int) -> dict[str, object]:
    world = World(rank, size, size)
    world.barrier()
    return {
        "is_rank_zero": world.is_rank_zero,
        "any": [world.any(flag) for flag in (False, rank == 1, True)],
        "broadcast": world.broadcast({"from": rank} if world.is_rank_zero else None),
        "first": [
            world.first(None),
            world.first("of one" if rank == 1 else None),
            world.first({"from": rank}),
        ],
        "sum": world.sum(torch.tensor([1.0, rank])).tolist(),
    }


def test_collectives_give_every_rank_the_same(ranks: Ranks) -> None:
    results = ranks.run(collectives)
    assert [result.pop("is_rank_zero") for result in results] == [True, False]
    expected = {
        "any": [False, True, True],
        "broadcast": {"from": 0},
        "first": [None, "of one", {"from": 0}],
        "sum": [2.0, 1.0],
    }
    assert results == [expected] * 2


@dataclass(frozen=True)
class RecordingWorld(World):
    """A world that records the calls of its collectives."""

    calls: list[str] = field(default_factory=list)

    def any(self, flag: bool) -> bool:
        self.calls.append("any")
        return super().any(flag)

    def broadcast(self, value: T) -> T:
        self.calls.append("broadcast")
        return super().broadcast(value)

    def sum(self, tensor: Tensor) -> Tensor:
        self.calls.append("sum")
        return super().sum(tensor)

    def barrier(self) -> None:
        self.calls.append("barrier")
        super().barrier()


def train_rank(
    rank: int, size: int, flags: dict[str, str], start: Start, stops: dict[int, int]
) -> tuple[list[str], bool]:
    """Return the collectives of a rank's part of a run, and whether it was stopped."""
    settings = load_settings(flags, "train")
    world = RecordingWorld(rank, size, size)
    trainer = Trainer(
        settings,
        start,
        1,
        open_training_data(settings),
        RunFolder(settings.run_dir),
        select_device("cpu", "float32", "auto"),
        world,
        StopAtPoll(poll_number=stops.get(rank, 0)),
    )
    try:
        trainer.fit()
    except Stopped:
        return world.calls, True
    return world.calls, False


class TwoRanks:
    """Small runs by two ranks on the same data."""

    def __init__(self, ranks: Ranks, data_dir: Path) -> None:
        self._ranks, self._data_dir = ranks, data_dir

    def train(self, run_name: str, **stops: int) -> tuple[list[str], list[str], bool]:
        """Start a run or continue it; return both ranks' collectives and whether it was stopped.

        Args:
            stops: rank_0, rank_1: the number of its poll at which a rank is to stop.
        """
        changes = {name: str(value) for name, value in SMALL.items()}
        paths = {"DATA_DIR": str(self._data_dir), "TRAIN_RUN_NAME": run_name}
        flags = TINY | changes | paths | {"TRAIN_SHARD_OPTIMIZER": "true"}
        settings = load_settings(flags, "train")
        run = RunFolder(settings.run_dir)
        run.path.mkdir(parents=True, exist_ok=True)
        start = plan_start(settings, open_training_data(settings), run)
        polls = {int(rank.removeprefix("rank_")): poll for rank, poll in stops.items()}
        (first, stopped), (second, also) = self._ranks.run(train_rank, flags, start, polls)
        assert stopped == also
        return first, second, stopped

    def run_dir(self, run_name: str) -> Path:
        return self._data_dir / "runs" / run_name


@pytest.fixture(scope="module")
def two_ranks(
    ranks: Ranks, text_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> TwoRanks:
    data_dir = tmp_path_factory.mktemp("two-ranks")
    (data_dir / "text").symlink_to(text_shards)
    two_ranks = TwoRanks(ranks, data_dir)
    first, second, stopped = two_ranks.train("unbroken")
    assert first == second
    assert not stopped
    return two_ranks


@pytest.mark.parametrize(
    "stops",
    (
        pytest.param({"rank_0": 1}, id="rank 0 before a micro-batch"),
        pytest.param({"rank_1": 1}, id="rank 1 before a micro-batch"),
        pytest.param({"rank_1": 4}, id="rank 1 in the evaluation"),
        pytest.param({"rank_1": 9}, id="rank 1 in HellaSwag"),
        pytest.param({"rank_0": 14}, id="rank 0 in a sample"),
        pytest.param({"rank_0": 4, "rank_1": 7}, id="both at different places"),
    ),
)
def test_both_ranks_make_the_same_collectives_wherever_one_is_stopped(
    two_ranks: TwoRanks, request: pytest.FixtureRequest, stops: dict[str, int]
) -> None:
    name = "-".join(f"{rank}-{poll}" for rank, poll in stops.items())
    first, second, stopped = two_ranks.train(name, **stops)
    assert first == second
    assert stopped
    assert first[-2:] == ["barrier", "any"]
    assert latest_checkpoint(two_ranks.run_dir(name)).step < LAST_STEP

    first, second, stopped = two_ranks.train(name)
    assert first == second
    assert not stopped
    assert_same_run(two_ranks.run_dir(name), two_ranks.run_dir("unbroken"), LAST_STEP)
