"""The verbs of `fledge` that look at what runs left. Loads nothing heavy until a verb is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.cli.train import AddVerb
    from training.config.sections import TtaConfig


def evaluate(options: argparse.Namespace) -> None:
    """Score a run's checkpoint on its own held-out photos, in float32."""
    from serving.utils.files import check_file
    from training.evaluation import evaluate as room
    from training.utils.console import log_to_stderr

    if options.csv is not None:
        check_file(options.csv, "--csv")
    result = room.evaluate(
        options.run,
        part=options.part,
        tta=_tta(options),
        data_folder=options.data,
        device=options.device,
        log=log_to_stderr,
    )
    if result.views > 1:
        accuracy, loss = room.score(result.plain, result.labels)
        log_to_stderr(f"plain view alone: accuracy {accuracy:.6f}  loss {loss:.6f}")
    if options.csv is not None:
        room.write_csv(result, options.csv)
    print(
        f"accuracy {result.accuracy:.6f}  loss {result.loss:.6f}  "
        f"photos {result.photos}  views {result.views}  broken {result.broken}"
    )


def report(options: argparse.Namespace) -> None:
    """Write a run's report.html: its accuracy, its mistakes as pictures, how it was trained."""
    from training.report import report as room
    from training.utils.console import log_to_stderr

    tta = _tta(options)
    if tta is None:
        tta = room.tta_of(options.run, log_to_stderr)
    print(
        room.write(
            options.run,
            part=options.part,
            tta=tta,
            data_folder=options.data,
            device=options.device,
            log=log_to_stderr,
        )
    )


def cache(options: argparse.Namespace) -> None:
    """Show what is kept between runs and what it takes; or remove it."""
    from training.utils import disk_cache as room

    there = room.open_cache(options.cache_gb)
    for line in room.clear(there) if options.clear else room.describe(there):
        print(line)


def add_to(verb: AddVerb) -> None:
    """Add these verbs and their options."""
    add = verb(evaluate, "fledge evaluate runs/latest --tta 4")
    _run_options(add)
    add.add_argument("--csv", type=Path, metavar="FILE", help="write a row for every photo")

    add = verb(report, "fledge report runs/latest --part test")
    _run_options(add)

    add = verb(cache, "fledge cache --clear")
    add.add_argument("--clear", action="store_true", help="remove all of it")
    cache_option(add)


def cache_option(add: argparse.ArgumentParser) -> None:
    """The budget of the cache."""
    add.add_argument(
        "--cache-gb",
        type=float,
        metavar="GB",
        help="budget of what is kept between runs; 0 keeps nothing; default: 10",
    )


def _run_options(add: argparse.ArgumentParser) -> None:
    """A run, its photos, and test-time augmentation."""
    add.add_argument("run", type=Path, metavar="RUN")
    add.add_argument("--part", default="valid", choices=["train", "valid", "test"])
    add.add_argument("--tta", type=int, metavar="N", help="views or draws to average; 0 is off")
    kinds = ["views", "flip", "five_crop", "multi_scale", "draws"]
    add.add_argument(
        "--tta-kind",
        choices=kinds,
        help="default: views; flip, five_crop and multi_scale have a number of views of their own",
    )
    add.add_argument("--average", choices=["mean", "log_mean"], help="default: mean")
    add.add_argument("--plain-weight", type=float, metavar="W", help="0 weighs all views alike")
    add.add_argument("--data", type=Path, metavar="DIR", help="where the photos are now")
    add.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def _tta(options: argparse.Namespace) -> TtaConfig | None:
    """The test-time augmentation that the command line asks for; None where it says nothing."""
    from pydantic import ValidationError

    from serving.errors import OptionError
    from training.config.sections import TtaConfig

    flags = {"count": "tta", "kind": "tta_kind"}
    flags |= {"average": "average", "plain_weight": "plain_weight"}
    given = {name: getattr(options, flag) for name, flag in flags.items()}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return TtaConfig(**given) if given else None
    except ValidationError as error:
        wrong = error.errors()[0]
        if not wrong["loc"]:  # of several options together
            said = wrong["msg"].removeprefix("Value error, ").replace("count = ", "--tta ")
            raise OptionError(said.replace("kind = 'draws'", "--tta-kind draws")) from None
        flag = flags[str(wrong["loc"][0])].replace("_", "-")
        raise OptionError(f"--{flag} {wrong['input']}: {wrong['msg'].lower()}") from None
