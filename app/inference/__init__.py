"""Evaluation and sampling."""
