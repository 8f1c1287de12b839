from tests.tools.conftest import text_shards
from tests.train.conftest import data_dir

__all__ = ["data_dir", "text_shards"]
