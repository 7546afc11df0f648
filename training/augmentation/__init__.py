"""Augmentation of training batches: geometric and colour transforms, RandAugment, mixup, cutmix."""
