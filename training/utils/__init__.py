"""Helpers of training: devices, precision, disk cache, timers, console output."""
