"""A page and pictures of how runs have learned."""
