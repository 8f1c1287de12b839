from tests.train.conftest import data_dir, ranks, start, text_shards, tiny, unbroken

__all__ = ["data_dir", "ranks", "start", "text_shards", "tiny", "unbroken"]
