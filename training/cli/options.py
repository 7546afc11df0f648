"""Command-line options that several subcommands share, and a check of `arch`."""

from __future__ import annotations

import argparse


def add_overrides(add: argparse.ArgumentParser) -> None:
    """Add the positional arguments `key=value` (recipe options) to the parser of a subcommand.

    Call this function after all other positional arguments have been added.
    """
    add.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change an option of the recipe, such as batch_size=16 or stage.head.lr=0.01",
    )


def add_cache_option(add: argparse.ArgumentParser) -> None:
    """Add the option `--cache-gb` to the parser of a subcommand."""
    add.add_argument(
        "--cache-gb",
        type=float,
        metavar="GB",
        help="size limit of the cache that is kept between runs; 0 keeps nothing; default: 10",
    )


def check_arch(arch: str) -> None:
    """Check that an architecture is known. This imports torchvision.

    Raises:
        OptionError: The architecture is unknown; the message suggests the nearest name.
    """
    from training.models import backbones

    backbones.family_of(arch)
