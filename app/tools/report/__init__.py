"""A page and pictures of how runs learned."""
