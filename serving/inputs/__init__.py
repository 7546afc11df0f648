"""Inputs of batch scoring: folders, lists of paths, tar archives and object stores."""
