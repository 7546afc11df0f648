"""Decoded photos as uint8 arrays: decoding, the cache on disk, and copies in GPU memory."""
