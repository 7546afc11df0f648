"""Batch scoring: from many images to one table, resumable."""
