"""The verbs of `fledge` that need this room. Loads nothing heavy until a verb is run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from training.cli import runs

if TYPE_CHECKING:
    from training.config.schema import Recipe


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
    from serving.errors import OptionError
    from training.distributed import torchrun
    from training.engine import finetune
    from training.utils import memory

    memory.keep_freed()
    with torchrun.joined() as process_group:
        how = {"cache_gb": options.cache_gb, "team": process_group}
        if options.resume is None:
            how |= {"split": options.split, "out": options.out, "device": options.device}
            finetune.run(_recipe(options), options.data, **how)
            return
        given = [word for word in (options.recipe, options.split, options.out) if word is not None]
        if given or options.overrides or options.weights or options.seed is not None:
            raise OptionError(
                "--resume RUN goes on as the run began; only --data, --device and --cache-gb fit"
            )
        root = None if options.data is None else Path(options.data)
        device = None if options.device == "auto" else options.device
        finetune.resume(options.resume, device=device, root=root, **how)


def lr_find(options: argparse.Namespace) -> None:
    """Find a learning rate by the range test, and on request train briefly with each choice."""
    from serving.errors import OptionError
    from training.distributed import torchrun
    from training.engine import lr_find as room
    from training.utils import memory

    torchrun.refuse("lr-find")
    if options.epochs is not None and not options.compare:
        raise OptionError(f"--epochs {options.epochs} has no effect without --compare; add it")
    epochs = 1 if options.epochs is None else options.epochs
    memory.keep_freed()
    curve, trials = room.lr_find(
        _recipe(options),
        options.data,
        split=options.split,
        stage=options.stage,
        start=options.start,
        out=options.out,
        device=options.device,
        compare=epochs if options.compare else None,
        cache_gb=options.cache_gb,
    )
    for pick in room.PICKS:
        trap = "  (a trap: too large)" if pick == "minimum" else ""
        print(f"{pick:<12}{curve.pick(pick):.3e}{trap}")
    if trials:
        after = f"after {epochs} epoch{'s' if epochs > 1 else ''}"
        print(f"\n{after:<16}lr         train   valid   accuracy")
    for trial in trials:
        print(
            f"{trial.pick:<16}{trial.lr:.2e}  {trial.train_loss:7.4f} {trial.valid_loss:7.4f}   "
            f"{trial.accuracy:.2%}"
        )


def layers(options: argparse.Namespace) -> None:
    """Show an architecture's layer groups, and what the stages of a recipe train of it."""
    from serving.errors import OptionError
    from training.config import load
    from training.preview import layer_groups as room

    arch, overrides = options.arch, list(options.overrides)
    if arch and "=" in arch:  # no ARCH, and the first override in its place
        arch, overrides = None, [arch, *overrides]
    if options.recipe is not None:
        overrides += [f"arch={json.dumps(arch)}"] if arch else []
        recipe = load.read(options.recipe, overrides, check_arch)
        lines = [*room.describe(recipe), "", *room.stages(recipe)]
    elif overrides:
        raise OptionError(f"{overrides[0]} changes a recipe; name it with --recipe FILE")
    else:
        lines = room.describe(room.of_arch(arch)) if arch else room.families()
    for line in lines:
        print(line)


def preview(options: argparse.Namespace) -> None:
    """Show what a data set is made of: counts, sizes, strange photos; or what training will see."""
    from serving.errors import OptionError
    from training.config import load
    from training.preview import preview as room

    if options.photo is not None and not options.augment:
        raise OptionError(f"--photo {options.photo} has no effect without --augment; add it")
    overrides = list(options.overrides)
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    if options.recipe is None:
        recipe = load.read_text(room.DEFAULTS, "fledge preview", overrides, check_arch)
    else:
        recipe = load.read(options.recipe, overrides, check_arch)
    if options.augment:
        where = {"split": options.split, "photo": options.photo}
        print(room.augmented(options.data, recipe, options.out, **where))
        return
    for line in room.preview(options.data, recipe, options.out, split=options.split):
        print(line)


def ablate(options: argparse.Namespace) -> None:
    """Measure the tricks of fine-tuning on one's own photos, one row a trick."""
    from serving.errors import OptionError
    from training.ablation import ablation, table, tricks
    from training.distributed import torchrun
    from training.utils import memory
    from training.utils.console import log_to_stderr

    torchrun.refuse("ablate")
    memory.keep_freed()
    base = _recipe(options)
    words = [word.strip() for word in (options.rows or "").split(",") if word.strip()]
    words += ["augment"] if options.augment else []
    rows = tricks.choose(words or ["first"])
    if options.against and options.against not in [row.name for row in rows]:
        rows_given = ",".join([*(words or ["first"]), options.against])
        tricks.choose([options.against], "--against")  # an unknown name is told as such
        raise OptionError(
            f"--against {options.against}: not among the rows that are run; add it: "
            f"--rows {rows_given}"
        )
    out = options.out or Path("runs") / f"ablation-{base.name}"
    trials = ablation.run(
        base,
        options.data,
        out,
        rows=rows,
        split=options.split,
        seeds=options.seeds,
        folds=options.folds,
        device=options.device,
        keep=options.keep,
        cache_gb=options.cache_gb,
        log=log_to_stderr,
    )
    found = table.lines(rows, trials, options.against)
    title = f"Ablation of {base.name} on {Path(options.data).name}"
    how = table.about(base, options.data, trials, options.device)
    table.write(found, out, title, how)
    table.show(found)
    log_to_stderr(f"{out}: ablation.csv, ablation.md, ablation.png")


def sample(options: argparse.Namespace) -> None:
    """Write the embedded data set, painted flowers, as a folder a class."""
    from training.data import sample as room

    options_given = {} if options.per_class is None else {"per_class": options.per_class}
    print(room.write(options.folder, seed=options.seed, **options_given))


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that the command line names, with its overrides."""
    from serving.errors import OptionError
    from training.config import load

    if options.recipe is None:
        raise OptionError("name a recipe, such as training/recipes/quick.toml")
    if options.data is None:
        raise OptionError("--data is missing: name the folder with the photos")

    overrides = list(options.overrides)
    if options.weights is not None:
        overrides.append(f"weights={json.dumps(options.weights, ensure_ascii=False)}")
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    return load.read(options.recipe, overrides, check_arch)


def add_to(verb: AddVerb) -> None:
    """Add this room's verbs and their options."""
    add = verb(
        train, "fledge train training/recipes/quick.toml --data photos batch_size=16",
        overrides=True,
    )  # fmt: skip
    _recipe_options(add)
    add.add_argument("--out", type=Path, metavar="RUN", help="default: runs/RECIPE")
    add.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with a run that was killed or interrupted"
    )
    add.usage = (
        "fledge train RECIPE --data DIR [options] [key=value …]\n       fledge train --resume RUN"
    )

    add = verb(
        lr_find, "fledge lr-find training/recipes/quick.toml --data photos --compare",
        overrides=True,
    )  # fmt: skip
    _recipe_options(add)
    add.add_argument("--stage", metavar="NAME", help="default: the first")
    add.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="FILE",
        help="checkpoint that the stage starts from",
    )
    add.add_argument("--out", type=Path, metavar="PNG", help="default: lr_find-STAGE.png")
    add.add_argument("--compare", action="store_true", help="train briefly with each suggestion")
    add.add_argument("--epochs", type=int, metavar="N", help="of --compare; default: 1")
    add.usage = "fledge lr-find RECIPE --data DIR [options] [key=value …]"

    add = verb(
        ablate, "fledge ablate training/recipes/tricks.toml --data photos --seeds 3",
        overrides=True,
    )  # fmt: skip
    _recipe_options(add)
    how_often = add.add_mutually_exclusive_group()
    how_often.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    how_often.add_argument("--folds", type=int, default=0, metavar="N", help="folds instead")
    add.add_argument(
        "--rows", metavar="A,B", help="names of rows or groups (first, onoff, augment, all)"
    )
    add.add_argument("--augment", action="store_true", help="each augmentation alone against none")
    add.add_argument("--against", default="", metavar="ROW", help="compare every row with this one")
    add.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ablation-RECIPE")
    add.add_argument("--keep", action="store_true", help="keep the weights of every trial")
    add.usage = "fledge ablate RECIPE --data DIR [options] [key=value …]"

    add = verb(layers, "fledge layers densenet121", overrides=True)
    add.add_argument("arch", nargs="?", metavar="ARCH", help="default: list them all")
    add.add_argument("--recipe", type=Path, metavar="FILE", help="show what its stages train")
    add.usage = "fledge layers [ARCH] [--recipe FILE [key=value …]]"

    runs.add_to(verb)

    add = verb(preview, "fledge preview photos data.valid=0.1", overrides=True)
    add.add_argument("data", metavar="DATA", help="as --data of fledge train")
    add.add_argument("--split", type=Path, metavar="CSV", help="path,fold for every photo")
    add.add_argument(
        "--out", type=Path, default=Path("preview"), metavar="FOLDER", help="of the picture"
    )
    add.add_argument(
        "--augment", action="store_true", help="draw one photo many times as training sees it"
    )
    add.add_argument("--photo", type=Path, metavar="FILE", help="the one to draw with --augment")
    add.add_argument("--recipe", type=Path, help="whose [data], [augment] and sizes count")
    add.add_argument("--seed", type=int, metavar="N")
    add.usage = "fledge preview DATA [options] [key=value …]"

    add = verb(sample, "fledge sample flowers")
    add.add_argument("folder", type=Path, help="a new folder")
    add.add_argument("--per-class", type=int, metavar="N")
    add.add_argument("--seed", type=int, default=0, metavar="N")


def _recipe_options(add: argparse.ArgumentParser) -> None:
    """A recipe, the photos it is for, and what is short for an override."""
    add.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="a TOML file; see training/recipes/"
    )
    add.add_argument(
        "--data",
        metavar="DIR",
        help="a folder with a folder a class, or with train/ and valid/ of such; "
        "or a set by name: sample (embedded), flowers102, oxford-iiit-pet",
    )
    add.add_argument("--split", type=Path, metavar="CSV", help="path,fold for every photo")
    add.add_argument("--weights", metavar="W", help="imagenet, none, auto or a file")
    add.add_argument("--seed", type=int, metavar="N")
    add.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    runs.cache_option(add)


def check_arch(arch: str) -> None:
    """Refuse an unknown architecture. Loads torchvision.

    Raises:
        OptionError: Names the nearest one.
    """
    from training.models import backbones

    backbones.family_of(arch)
