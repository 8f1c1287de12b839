"""Writing a trained model for other programs."""
