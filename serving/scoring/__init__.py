"""Batch scoring: many images -> one table of scores, resumable, locally or on a Ray cluster."""
