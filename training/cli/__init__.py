"""Subcommands of `fledge` for training: train, evaluate, report, preview and others."""
