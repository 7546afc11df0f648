"""Helpers for training: devices, precision, disk cache, timers, console output."""
