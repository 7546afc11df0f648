"""Data augmentation of batches: warps, colour, policies, mixup and cutmix."""
