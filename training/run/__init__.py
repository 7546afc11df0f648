"""The run directory: checkpoints, resume state, metric logs."""
