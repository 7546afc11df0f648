"""Command-line options that several subcommands share, and the check of a recipe's network."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from serving.terminal import quote, quote_path

if TYPE_CHECKING:
    from training.config.schema import Recipe
    from training.config.toml_lines import Path


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
    add.set_defaults(suggest=suggest)


def suggest(word: str, options: argparse.Namespace, words: Sequence[str]) -> str:
    """Return what to write instead of an unknown option or argument, as "; did you mean …?", or "".

    Args:
        word: The unknown word: an option such as "--epochs", or an argument without "=".
        options: The parsed command line.
        words: The command line.
    """
    from serving.cli_hints import value_of
    from training.config import load, shipped

    verb, recipe = options.verb_name, getattr(options, "recipe", None)
    value = value_of(word, words)
    given = [str(recipe), *options.overrides] if recipe is not None else options.overrides
    files = [one for one in given if "=" not in one and one not in (word, value)]
    if word.startswith("--"):
        key = word[2:].partition("=")[0].replace("-", "_")
        found = next((one for one in files if shipped.find(FilePath(one)).is_file()), "quick")
        return load.suggest(FilePath(found), key, value)
    if verb == "preview" and options.data and shipped.find(FilePath(options.data)).is_file():
        quoted = f"{quote(word)} --recipe {quote_path(options.data)}"
        return f"; did you mean `fledge preview {quoted}`?"
    if word.startswith("-") or not hasattr(options, "weights"):
        return ""
    # An argument too many: the photos, or the recipe if the photos stand before it.
    recipe, data = next(iter(files), "quick"), word
    if FilePath(recipe).is_dir() and shipped.find(FilePath(word)).is_file():
        recipe, data = word, recipe
    if options.data is not None:
        key = word.rstrip(":")
        if not _is_option(key.rpartition(".")[2]):
            return "; an option of the recipe is written as key=value"
        found = next((one for one in files if shipped.find(FilePath(one)).is_file()), "quick")
        hint = load.suggest(FilePath(found), key, value)
        return hint or f"; an option of the recipe is written as {key}=VALUE"
    return f"; did you mean `fledge {verb} {quote_path(recipe)} --data {quote_path(data)}`?"


def _is_option(name: str) -> bool:
    """Whether a word is the name of an option of recipes, or another tool's word for one."""
    from training.config import other_tools, overrides, suggestions

    known = (suggestions.names(table) for table in overrides.SECTIONS)
    named = name == overrides.EPOCHS or any(name in names for names in known)
    return named or other_tools.find(name) is not None


def add_cache_option(add: argparse.ArgumentParser) -> None:
    """Add the option `--cache-gb` to the parser of a subcommand."""
    add.add_argument(
        "--cache-gb",
        type=float,
        metavar="GB",
        help="size limit of the cache that is kept between runs; 0 keeps nothing; default: 10",
    )


def check_network(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Yield the path and the description of each mistake of a recipe that concerns its network.

    This imports torch. No weights are read.
    """
    from training.engine import plan

    return plan.mistakes(recipe)
