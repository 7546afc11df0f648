"""The server process: checks before the start, start, graceful shutdown."""
