"""Augmentation of batches: geometric and colour transforms, policies, mixup and cutmix."""
