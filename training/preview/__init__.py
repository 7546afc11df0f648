"""A look at data and network before training."""
