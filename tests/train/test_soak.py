import random
import subprocess
from pathlib import Path

import pytest

from tests.train.test_process import Process, assert_same_run, run_to_end

KILLS = 30


@pytest.mark.soak
def test_killed_at_random_moments_equals_unbroken(data_dir: Path) -> None:
    def start(**changes: object) -> Process:
        return Process(data_dir, TRAIN_CHECKPOINT_EVERY=1, TRAIN_COMPILE="true", **changes)

    unbroken = run_to_end(start, TRAIN_RUN_NAME="unbroken")
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start()
        try:
            process.process.communicate(timeout=moments.uniform(0, 25))
        except subprocess.TimeoutExpired:
            process.process.kill()
            process.end()
    assert_same_run(run_to_end(start).run_dir, unbroken.run_dir)
