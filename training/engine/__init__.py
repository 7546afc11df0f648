"""Fine-tuning loop: stages, epochs, learning-rate range test, best checkpoint."""
