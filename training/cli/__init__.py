"""Subcommands of `fledge` that use the package `training`."""
