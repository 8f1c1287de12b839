from tests.prepare.conftest import start

__all__ = ["start"]
