from pathlib import Path

import pytest

from tests.prepare.conftest import gpt2
from tests.tools.small_run import train_small_run
from tests.train.conftest import text_shards

__all__ = ["gpt2", "text_shards"]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a model was trained, to copy."""
    return train_small_run(tmp_path_factory.mktemp("workshop"))
