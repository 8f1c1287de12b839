"""A page on which to try a model: a small server on this machine, and what it serves."""
