"""Subcommands of `fledge` for data and networks before training: layers, preview, sample.

Imports of large packages are inside the functions. This keeps `fledge --help` fast.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from serving.terminal import quote, quote_path, show
from training.cli.options import add_overrides, check_network

if TYPE_CHECKING:
    from serving.cli import AddVerb


def layers(options: argparse.Namespace) -> None:
    """Show an architecture's layer groups, and which of them the stages of a recipe train."""
    from serving.errors import OptionError
    from training.config import load, shipped
    from training.preview import layer_groups

    arch, overrides = options.arch, list(options.overrides)
    if arch and "=" in arch:  # without ARCH, the first override was parsed as ARCH
        arch, overrides = None, [arch, *overrides]
    if options.recipe is not None:
        overrides += [f"arch={json.dumps(arch)}"] if arch else []
        recipe = load.read(options.recipe, overrides, check_network)
        lines = [*layer_groups.describe(recipe), "", *layer_groups.stages(recipe)]
    elif arch and "/" not in arch and shipped.find(Path(arch)).is_file():
        raise OptionError(f"{arch} is a recipe: `fledge layers --recipe {quote_path(arch)}`")
    elif overrides:
        raise OptionError(f"{overrides[0]} changes a recipe; name it with --recipe FILE")
    else:
        lines = (
            layer_groups.describe(layer_groups.of_arch(arch)) if arch else layer_groups.families()
        )
    for line in lines:
        show(line)


def preview(options: argparse.Namespace) -> None:
    """Show the data: counts, sizes, odd photos; with --augment, a photo as training augments it."""
    from serving.errors import OptionError
    from serving.inputs.path_kind import require
    from training.config import load, shipped
    from training.data.dataset import SAMPLE
    from training.preview.preview import augmented, preview

    if options.photo is not None and not options.augment:
        raise OptionError(f"--photo {options.photo} has no effect without --augment; add it")
    _settle_data(options)
    data = Path(options.data)
    if not data.exists() and shipped.find(data).is_file():
        raise OptionError(
            f"{data} is a recipe: `fledge preview photos --recipe {quote_path(data)}`"
        )
    require(data, "photos")
    overrides = list(options.overrides)
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    # Without --recipe, what `make train` would train: the Makefile has the same default.
    default = Path("demo" if options.data == SAMPLE else "quick")
    recipe = load.read(options.recipe or default, overrides)
    if options.augment:
        show(augmented(options.data, recipe, options.out, split=options.split, photo=options.photo))
        return
    words = ["fledge train", quote_path(options.recipe or default)]
    words += ["--data", quote_path(options.data)]
    words += ["--split", quote_path(options.split)] if options.split is not None else []
    words += [quote(word) for word in overrides if not word.startswith("preprocess.fit=")]
    command = " ".join(words)
    lines = preview(options.data, recipe, options.out, split=options.split, command=command)
    for line in lines:
        show(line)


def _settle_data(options: argparse.Namespace) -> None:
    """Set `options.data` to the data set, which stands first or after `--data`."""
    from serving.errors import OptionError

    first, named = options.data, options.data_option
    if first is not None and "=" in first and (named is not None or not Path(first).exists()):
        options.overrides, first = [first, *options.overrides], None  # parsed as DATA
    if named is not None and first is not None:
        raise OptionError(
            f"{quote(first)} and --data {quote(named)} both name the data; keep one of them"
        )
    if named is None and first is None:
        raise OptionError("name the data: fledge preview DATA, or --data DATA")
    options.data = first if named is None else named


def sample(options: argparse.Namespace) -> None:
    """Write the embedded data set, painted flowers, one folder per class."""
    from training.data.sample import write_sample

    per_class = {} if options.per_class is None else {"per_class": options.per_class}
    show(write_sample(options.folder, seed=options.seed, **per_class))


def add_to(add_verb: AddVerb) -> None:
    """Add the subcommands layers, preview and sample, with their options, to the parser.

    Args:
        add_verb: Function that adds a subcommand, given its function and an example.
    """
    add = add_verb(layers, "fledge layers densenet121")
    add.add_argument("arch", nargs="?", metavar="ARCH", help="default: list all architectures")
    add_overrides(add)
    add.add_argument("--recipe", type=Path, metavar="FILE", help="show what its stages train")
    add.usage = "fledge layers [ARCH] [--recipe FILE [key=value …]]"

    add = add_verb(preview, "fledge preview photos data.valid=0.1")
    add.add_argument("data", nargs="?", metavar="DATA", help="as --data of fledge train")
    add_overrides(add)
    add.add_argument("--data", dest="data_option", metavar="DATA", help="another way to give DATA")
    add.add_argument("--split", type=Path, metavar="CSV", help="a table path,fold for every photo")
    add.add_argument(
        "--out",
        type=Path,
        default=Path("preview"),
        metavar="FOLDER",
        help="folder to write the picture to; default: preview",
    )
    add.add_argument(
        "--augment", action="store_true", help="draw one photo many times as training sees it"
    )
    add.add_argument("--photo", type=Path, metavar="FILE", help="the photo to draw with --augment")
    add.add_argument(
        "--recipe",
        type=Path,
        help="read [data], [augment] and image sizes from this recipe; default: quick",
    )
    add.add_argument("--seed", type=int, metavar="N")
    add.usage = "fledge preview DATA [options] [key=value …]"

    add = add_verb(sample, "fledge sample flowers")
    add.add_argument("folder", type=Path, help="a new folder")
    add.add_argument("--per-class", type=int, metavar="N", help="photos of each class")
    add.add_argument("--seed", type=int, default=0, metavar="N")
