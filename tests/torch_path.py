"""Tests that need torch.compile, which no path with spaces or quotes lets work."""

from importlib.util import find_spec

import pytest

from app.failures import is_one_word

_torch = find_spec("torch")

needs_torch_compile = pytest.mark.skipif(
    not is_one_word((_torch and _torch.origin) or ""),
    reason="torch.compile does not work where torch's path has spaces or quotes",
)
