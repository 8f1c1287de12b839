"""gpt-compose: from raw web text to a trained GPT-2 in two commands; see app.python for Python."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.python import load, prepare, train

__all__ = ["load", "prepare", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the functions when they are first used: every command imports this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Their packages are imported first: a later import would put them in the functions' place.
    for package in ("prepare", "train"):
        import_module(f"app.{package}")
    python = import_module("app.python")
    globals().update({function: getattr(python, function) for function in __all__})
    return globals()[name]
