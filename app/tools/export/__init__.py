"""Export of a trained model for other programs."""
