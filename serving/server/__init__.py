"""The server process: start, checks before the start, shutdown."""
