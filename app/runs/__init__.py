"""A run's folder: what outlives the process."""
