"""Subcommands of `fledge` that train with a recipe: train, lr-find, ablate.

Imports of large packages are inside the functions. This keeps `fledge --help` fast.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from serving.terminal import quote_path, show
from training.cli.options import add_cache_option, add_overrides, check_network

if TYPE_CHECKING:
    from serving.cli import AddVerb
    from training.config.schema import Recipe


def train(options: argparse.Namespace) -> None:
    """Fine-tune a network on a folder of photos."""
    from serving.errors import OptionError
    from serving.inputs.path_kind import require
    from serving.utils.malloc import retain_freed_blocks

    if options.resume is None:
        _check_arguments(options)
    from training.distributed import torchrun
    from training.engine import finetune

    retain_freed_blocks()
    with torchrun.init_process_group() as process_group:
        common = {"cache_gb": options.cache_gb, "process_group": process_group}
        if options.resume is None:
            finetune.run(
                _recipe(options),
                options.data,
                split=options.split,
                out=options.out,
                device=options.device,
                **common,
            )
            return
        given = [word for word in (options.recipe, options.split, options.out) if word is not None]
        if given or options.overrides or options.weights or options.seed is not None:
            raise OptionError(
                "--resume RUN keeps the run's recipe and options; only --data, --device and "
                "--cache-gb may be given with it"
            )
        require(options.resume, "resumable", "--resume")
        root = None if options.data is None else Path(options.data)
        device = None if options.device == "auto" else options.device
        finetune.resume(options.resume, device=device, root=root, **common)


def lr_find(options: argparse.Namespace) -> None:
    """Run the learning rate range test; --compare also trains briefly with each suggestion."""
    from serving.errors import OptionError
    from serving.utils.malloc import retain_freed_blocks

    _check_arguments(options)
    from training.distributed import torchrun
    from training.engine.lr_find import PICKS, lr_find

    torchrun.require_single_process("lr-find")
    if options.epochs is not None and not options.compare:
        raise OptionError(f"--epochs {options.epochs} has no effect without --compare; add it")
    epochs = 1 if options.epochs is None else options.epochs
    retain_freed_blocks()
    curve, trials = lr_find(
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
    for pick in PICKS:
        trap = "  (a trap: too large)" if pick == "minimum" else ""
        show(f"{pick:<12}{curve.pick(pick):.3e}{trap}")
    if trials:
        after = f"after {epochs} epoch{'s' if epochs > 1 else ''}"
        show()
        show(f"{after:<16}lr         train   valid   accuracy")
    for trial in trials:
        show(
            f"{trial.pick:<16}{trial.lr:.2e}  {trial.train_loss:7.4f} {trial.valid_loss:7.4f}   "
            f"{trial.accuracy:.2%}"
        )


def ablate(options: argparse.Namespace) -> None:
    """Measure techniques of fine-tuning on your own photos, one row per technique."""
    from serving.errors import OptionError
    from serving.utils.malloc import retain_freed_blocks

    _check_arguments(options)
    from training.ablation import ablation, table, tricks
    from training.distributed import torchrun
    from training.utils.console import log_to_stderr

    torchrun.require_single_process("ablate")
    retain_freed_blocks()
    base = _recipe(options)
    words = [word.strip() for word in (options.rows or "").split(",") if word.strip()]
    words += ["augment"] if options.augment else []
    rows = tricks.choose(words or ["first"])
    if options.against and options.against not in [row.name for row in rows]:
        tricks.choose([options.against], "--against")  # refuses an unknown name
        with_it = ",".join([*(words or ["first"]), options.against])
        raise OptionError(
            f"--against {options.against}: not among the rows that are run; add it: "
            f"--rows {with_it}"
        )
    out = options.out or Path("runs") / f"ablation-{base.name}"
    ablation_options = ablation.AblationOptions(
        split=options.split,
        seeds=options.seeds,
        folds=options.folds,
        device=options.device,
        keep=options.keep,
        cache_gb=options.cache_gb,
    )
    trials = ablation.run(base, options.data, out, rows, ablation_options, log_to_stderr)
    lines = table.lines(rows, trials, options.against)
    title = f"Ablation of {base.name} on {Path(options.data).name}"
    table.write(lines, out, title, table.about(base, options.data, trials, options.device))
    table.show(lines)
    log_to_stderr(f"{out}: ablation.csv, ablation.md, ablation.png")


def _recipe(options: argparse.Namespace) -> Recipe:
    """Read the recipe that the command line names, and apply the overrides `key=value`.

    Raises:
        OptionError: No recipe or no `--data` is given, or the recipe or an override is wrong.
    """
    from training.config import load, shipped
    from training.utils.console import log_to_stderr

    _check_arguments(options)
    own = shipped.other(options.recipe)
    if own is not None:
        log_to_stderr(f"{options.recipe}: the recipe that Fledge ships; yours is named {own}")
    overrides = list(options.overrides)
    if options.weights is not None:
        overrides.append(f"weights={json.dumps(options.weights, ensure_ascii=False)}")
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    return load.read(options.recipe, overrides, check_network)


def _check_arguments(options: argparse.Namespace) -> None:
    """Check that a recipe and photos are named. This takes no time: it does not import torch.

    Raises:
        OptionError: One is missing, or is something else.
    """
    from serving.errors import OptionError
    from serving.inputs.path_kind import not_wanted, require
    from training.config import shipped

    if options.recipe is None:
        data = "photos" if options.data is None else quote_path(options.data)
        raise OptionError(f"name a recipe: `fledge {options.verb_name} quick --data {data}`")
    found = shipped.find(options.recipe)
    if found.exists() and not_wanted(found, "recipe"):
        raise OptionError(not_wanted(found, "recipe"))
    if options.data is None:
        again = f"fledge {options.verb_name} {quote_path(options.recipe)} --data photos"
        raise OptionError(f"--data is missing: name the folder with the photos, as in `{again}`")
    require(Path(options.data), "photos", "--data")


def add_to(add_verb: AddVerb) -> None:
    """Add the subcommands train, lr-find and ablate, with their options, to the parser.

    Args:
        add_verb: Function that adds a subcommand, given its function and an example.
    """
    add = add_verb(train, "fledge train quick --data photos batch_size=16")
    _recipe_options(add)
    add.add_argument("--out", type=Path, metavar="RUN", help="default: runs/RECIPE")
    add.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue a run that was killed or interrupted"
    )
    add.usage = (
        "fledge train RECIPE --data DIR [options] [key=value …]\n       fledge train --resume RUN"
    )

    add = add_verb(lr_find, "fledge lr-find quick --data photos --compare")
    _recipe_options(add)
    add.add_argument("--stage", metavar="NAME", help="default: the first")
    add.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="FILE",
        help="checkpoint that the stage starts from",
    )
    add.add_argument(
        "--out", type=Path, metavar="PNG", help="default: runs/lr-find-RECIPE/lr_find-STAGE.png"
    )
    add.add_argument("--compare", action="store_true", help="train briefly with each suggestion")
    add.add_argument("--epochs", type=int, metavar="N", help="of --compare; default: 1")
    add.usage = "fledge lr-find RECIPE --data DIR [options] [key=value …]"

    add = add_verb(ablate, "fledge ablate tricks --data photos --seeds 3")
    _recipe_options(add)
    repeats = add.add_mutually_exclusive_group()
    repeats.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    repeats.add_argument(
        "--folds", type=int, default=0, metavar="N", help="cross-validate instead of seeds"
    )
    add.add_argument(
        "--rows", metavar="A,B", help="names of rows or groups (first, onoff, augment, all)"
    )
    add.add_argument("--augment", action="store_true", help="compare each augmentation with none")
    add.add_argument("--against", default="", metavar="ROW", help="compare every row with this one")
    add.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ablation-RECIPE")
    add.add_argument("--keep", action="store_true", help="keep the weights of every trial")
    add.usage = "fledge ablate RECIPE --data DIR [options] [key=value …]"


def _recipe_options(add: argparse.ArgumentParser) -> None:
    from training.config.shipped import names

    add.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        metavar="RECIPE",
        help=f"a TOML file, or the name of a shipped recipe: {', '.join(names())}",
    )
    add_overrides(add)
    add.add_argument(
        "--data",
        metavar="DIR",
        help="a folder with one folder per class, or with train/ and valid/ of such; "
        "or a zip or tar of such a folder; or a table of photos and labels; "
        "or a data set by name: sample (embedded), flowers102, oxford-iiit-pet",
    )
    add.add_argument("--split", type=Path, metavar="CSV", help="a table path,fold for every photo")
    add.add_argument("--weights", metavar="W", help="imagenet, none, auto or a file")
    add.add_argument("--seed", type=int, metavar="N")
    add.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add_cache_option(add)
