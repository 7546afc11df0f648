"""Photos in, checkpoint out. Imports serving's decoder and preprocessing, never export."""
