"""Helpers that don't depend on models: files, processes, CPUs, memory, progress."""
