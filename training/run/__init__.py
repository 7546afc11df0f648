"""Files of a run folder: checkpoints, resume state, metric logs."""
