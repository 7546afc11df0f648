"""The fine-tuning loop: stages, epochs, learning-rate search, best checkpoint."""
