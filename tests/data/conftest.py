from tests.prepare.conftest import gpt2, start

__all__ = ["gpt2", "start"]
