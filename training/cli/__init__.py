"""Subcommands of `fledge` that need training."""
