"""Networks to export, with photos of their classes: runs, and checkpoints from elsewhere."""
