"""Helpers without knowledge of models: files, processes, CPUs, memory, progress."""
