"""A page on which to try trained models."""
