"""gpt-compose: from raw web text to a trained GPT-2 in two commands."""

__version__ = "0.1.0"
