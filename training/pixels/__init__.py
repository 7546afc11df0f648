"""Decoded photos as uint8 arrays: the disk cache, row sources, copies to the GPU."""
