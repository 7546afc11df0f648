"""Subcommands of `fledge` that read finished runs or the cache: evaluate, report, cache.

Imports of large packages are inside the functions. This keeps `fledge --help` fast.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.terminal import show
from training.cli.options import add_cache_option

if TYPE_CHECKING:
    from serving.cli import AddVerb
    from training.config.sections import TtaConfig


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a run's checkpoint on its own held-out photos, in float32."""
    from serving.errors import OptionError
    from serving.inputs.path_kind import require
    from serving.utils.files import check_file
    from training.evaluation.evaluate import evaluate, score, write_csv
    from training.evaluation.fits import advice, compare, parse, table
    from training.utils.console import log_to_stderr

    require(options.run, "run")
    if options.csv is not None:
        check_file(options.csv, "--csv")
    fits = parse(options.fit) if options.fit is not None else []
    if len(fits) > 1 and options.csv is not None:
        raise OptionError("--csv takes the answers with one fit: name one with --fit")
    common: dict[str, Any] = {
        "part": options.part,
        "tta": _tta_config(options),
        "data_folder": options.data,
        "device": options.device,
        "log": log_to_stderr,
    }
    found = compare(options.run, fits, **common) if fits else []
    if found:
        result, lines = found[-1].result, list(table(found))
    else:
        result = evaluate(options.run, **common)
        if result.views > 1:
            accuracy, loss = score(result.plain, result.labels)
            log_to_stderr(f"plain view: accuracy {accuracy:.6f}  loss {loss:.6f}")
        lines = [
            f"accuracy {result.accuracy:.6f}  loss {result.loss:.6f}  "
            f"photos {result.photos}  views {result.views}  broken {result.broken}"
        ]
    if options.csv is not None:
        write_csv(result, options.csv, safe=options.csv_safe)
    for line in lines:
        show(line)
    if len(found) > 1:
        log_to_stderr(advice(found, options.run, options.data))


def report(options: argparse.Namespace) -> None:
    """Write a run's report.html: its accuracy, its mistakes as pictures, how it was trained."""
    from serving.inputs.path_kind import require
    from training.report.report import tta_of, write
    from training.utils.console import log_to_stderr

    require(options.run, "run")
    tta = _tta_config(options)
    if tta is None:
        tta = tta_of(options.run, log_to_stderr)
    path = write(
        options.run,
        part=options.part,
        tta=tta,
        data_folder=options.data,
        device=options.device,
        log=log_to_stderr,
    )
    show(path)


def cache(options: argparse.Namespace) -> None:
    """Show what is cached between runs and how large it is; or remove it."""
    from training.utils.cache_report import clear, describe
    from training.utils.disk_cache import open_cache

    disk_cache = open_cache(options.cache_gb)
    for line in clear(disk_cache) if options.clear else describe(disk_cache):
        show(line)


def add_to(add_verb: AddVerb) -> None:
    """Add the subcommands evaluate, report and cache, with their options, to the parser.

    Args:
        add_verb: Function that adds a subcommand, given its function and an example.
    """
    from serving.cli import csv_safe_option

    add = add_verb(evaluate, "fledge evaluate runs/latest --tta 4")
    _run_options(add)
    add.add_argument(
        "--fit",
        metavar="LIST",
        help="compare ways to fit photos into a square: one or more of crop,squish,pad",
    )
    add.add_argument("--csv", type=Path, metavar="FILE", help="write a row for every photo")
    csv_safe_option(add)

    add = add_verb(report, "fledge report runs/latest --part test")
    _run_options(add)

    add = add_verb(cache, "fledge cache --clear")
    add.add_argument("--clear", action="store_true", help="remove everything in the cache")
    add_cache_option(add)


def _run_options(add: argparse.ArgumentParser) -> None:
    """Add the options for a run, for the photos, and for test-time augmentation (TTA)."""
    add.add_argument("run", type=Path, metavar="RUN")
    add.add_argument("--part", default="valid", choices=["train", "valid", "test"])
    add.add_argument("--tta", type=int, metavar="N", help="views or draws to average; 0 is off")
    add.add_argument(
        "--tta-kind",
        choices=["views", "flip", "five_crop", "multi_scale", "draws"],
        help="default: views; flip, five_crop and multi_scale fix the number of views",
    )
    add.add_argument("--average", choices=["mean", "log_mean"], help="default: mean")
    add.add_argument(
        "--plain-weight",
        type=float,
        metavar="W",
        help="weight of the plain view, from 0 to 1; 0 weighs all views equally",
    )
    add.add_argument("--data", type=Path, metavar="DIR", help="the photos, if they were moved")
    add.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def _tta_config(options: argparse.Namespace) -> TtaConfig | None:
    """Return the test-time augmentation (TTA) that the command-line options set.

    Returns:
        The options; None if no option for TTA is given.

    Raises:
        OptionError: The value of an option for TTA is wrong.
    """
    from pydantic import ValidationError

    from serving.errors import OptionError
    from training.config.sections import TtaConfig

    option_of = {
        "count": "tta",
        "kind": "tta_kind",
        "average": "average",
        "plain_weight": "plain_weight",
    }
    given = {name: getattr(options, option) for name, option in option_of.items()}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return TtaConfig(**given) if given else None
    except ValidationError as error:
        wrong = error.errors()[0]
        if not wrong["loc"]:  # raised by a check of several options together
            message = wrong["msg"].removeprefix("Value error, ").replace("count = ", "--tta ")
            raise OptionError(message.replace("kind = 'draws'", "--tta-kind draws")) from None
        option = option_of[str(wrong["loc"][0])].replace("_", "-")
        raise OptionError(f"--{option} {wrong['input']}: {wrong['msg'].lower()}") from None
