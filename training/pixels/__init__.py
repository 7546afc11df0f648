"""Decoded photos as uint8 arrays: cached on disk, in memory or on the GPU."""
