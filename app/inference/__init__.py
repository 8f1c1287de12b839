"""Running a model that is not being trained."""
