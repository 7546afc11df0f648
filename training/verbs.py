"""The verbs of `fledge` that need this room. Loads nothing heavy until a verb is run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from training.options import Recipe


class AddVerb(Protocol):
    """Adds a verb to the command line; its help is the first line of the function's docstring."""

    def __call__(
        self,
        function: Callable[[argparse.Namespace], None],
        example: str,
        *,
        overrides: bool = False,
    ) -> argparse.ArgumentParser:
        """Return the verb's parser, to add options to."""
        ...


def train(options: argparse.Namespace) -> None:
    """Fine-tune a network on a folder of photos."""
    from training import recipe

    recipe.run(
        _recipe(options), options.data, split=options.split, out=options.out, device=options.device
    )


def evaluate(options: argparse.Namespace) -> None:
    """Score a run's checkpoint on its own held-out photos, in float32."""
    from training import evaluate as room
    from training.console import say

    result = room.evaluate(
        options.run, part=options.part, tta=options.tta, data_folder=options.data, say=say
    )
    print(
        f"accuracy {result.accuracy:.6f}  loss {result.loss:.6f}  "
        f"photos {result.photos}  views {result.views}  broken {result.broken}"
    )


def sample(options: argparse.Namespace) -> None:
    """Write the embedded data set, painted flowers, as a folder a class."""
    from training import sample as room

    options_given = {} if options.per_class is None else {"per_class": options.per_class}
    print(room.write(options.folder, seed=options.seed, **options_given))


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that the command line names, with its overrides."""
    from training import config

    overrides = list(options.overrides)
    if options.weights is not None:
        overrides.append(f"weights={json.dumps(options.weights, ensure_ascii=False)}")
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    return config.read(options.recipe, overrides)


def add_to(verb: AddVerb) -> None:
    """Add this room's verbs and their options."""
    add = verb(
        train, "fledge train training/recipes/quick.toml --data photos batch_size=16",
        overrides=True,
    )  # fmt: skip
    _recipe_options(add)
    add.add_argument("--out", type=Path, metavar="RUN", help="default: runs/RECIPE")
    add.usage = "fledge train RECIPE --data DIR [options] [key=value …]"

    add = verb(evaluate, "fledge evaluate runs/latest --tta 4")
    add.add_argument("run", type=Path, metavar="RUN")
    add.add_argument("--part", default="valid", choices=["train", "valid", "test"])
    add.add_argument("--tta", type=int, default=0, metavar="N", help="views to average")
    add.add_argument("--data", type=Path, metavar="DIR", help="where the photos are now")

    add = verb(sample, "fledge sample flowers")
    add.add_argument("folder", type=Path, help="a new folder")
    add.add_argument("--per-class", type=int, metavar="N")
    add.add_argument("--seed", type=int, default=0, metavar="N")


def _recipe_options(add: argparse.ArgumentParser) -> None:
    """A recipe, the photos it is for, and what is short for an override."""
    add.add_argument("recipe", type=Path, help="a TOML file; see training/recipes/")
    add.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a folder with a folder a class, or with train/ and valid/ of such; "
        "'sample' is the embedded set",
    )
    add.add_argument("--split", type=Path, metavar="CSV", help="path,fold for every photo")
    add.add_argument("--weights", metavar="W", help="imagenet, none, auto or a file")
    add.add_argument("--seed", type=int, metavar="N")
    add.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
