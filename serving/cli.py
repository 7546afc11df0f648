"""Subcommands of `fledge` for bundles: inspect, verify, serve, score, evaluate-scores.

The modules that a subcommand needs are imported when the subcommand runs. This keeps
`fledge --help` fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from serving.errors import OptionError
from serving.terminal import quote_path, show, show_json


class AddVerb(Protocol):
    """Signature of a function that adds a subcommand to `fledge` and returns its argument parser.

    The name of the subcommand is the name of `function`; its help text is the first line of the
    docstring of `function`. `example` is a command line to show in the help.
    """

    def __call__(
        self, function: Callable[[argparse.Namespace], None], example: str
    ) -> argparse.ArgumentParser: ...


def inspect(options: argparse.Namespace) -> None:
    """Check every byte of a bundle and show what it holds; --json prints the manifest."""
    from serving.bundle.inspect import describe
    from serving.bundle.storage import read
    from serving.inputs.path_kind import require

    require(options.bundle, "bundle")
    if options.json:
        show_json(read(options.bundle).manifest.to_json())
        return
    for line in describe(options.bundle):
        show(line)


def verify(options: argparse.Namespace) -> None:
    """Check a bundle's bytes and run its golden images through the runtime. Needs no torch."""
    from serving.inference import isolated_load
    from serving.inputs.path_kind import require
    from serving.settings import load_timeout

    require(options.bundle, "bundle")
    arguments = {"seconds": load_timeout(), "device": options.device}
    for line in isolated_load.run("verify", options.bundle, **arguments):
        show(line)


def serve(options: argparse.Namespace) -> None:
    """Serve a bundle over HTTP."""
    from serving.inputs.path_kind import require
    from serving.server.launch import serve

    require(options.bundle, "bundle")
    serve(
        options.bundle,
        host=options.host,
        port=options.port,
        device=options.device,
        precision=options.precision,
        workers=options.workers,
    )


def score(options: argparse.Namespace) -> None:
    """Score many images into a table, one row per image; called again it resumes."""
    from dataclasses import fields

    from serving.inputs.path_kind import require
    from serving.scoring.options import ScoringOptions
    from serving.scoring.score import score

    _check_score(options)
    require(options.bundle, "bundle", "--bundle")
    for name in options.inputs:
        require(Path(name), "photos")
    values = {field.name: getattr(options, field.name) for field in fields(ScoringOptions)}
    score(options.inputs, options.bundle, options.out, ScoringOptions(**values))


def _check_score(options: argparse.Namespace) -> None:
    """Check that `fledge score` has a bundle and a table; the bundle may stand among the inputs.

    Raises:
        OptionError: One is missing.
    """
    from serving.inputs.path_kind import is_bundle

    missing = [name for name in ("bundle", "out") if getattr(options, name) is None]
    if not missing:
        return
    bundles = [name for name in options.inputs if is_bundle(Path(name))]
    inputs = [name for name in options.inputs if name not in bundles] or ["photos"]
    bundle = options.bundle or (bundles or ["bundle"])[0]
    out = options.out or "scores.csv"
    quoted = " ".join(map(quote_path, inputs))
    command = f"fledge score {quoted} --bundle {quote_path(bundle)} --out {quote_path(out)}"
    raise OptionError(
        f"{' and '.join(f'--{name}' for name in missing)} missing: did you mean `{command}`?"
    )


def evaluate_scores(options: argparse.Namespace) -> None:
    """Compare a table of scores with true labels: accuracy, confusions, log loss; no model."""
    from dataclasses import fields

    from serving.evaluation.evaluate_scores import EvaluationOptions, evaluate
    from serving.inputs.path_kind import require

    require(options.scores, "table")
    if options.bundle is not None:
        require(options.bundle, "bundle", "--bundle")
    values = {field.name: getattr(options, field.name) for field in fields(EvaluationOptions)}
    evaluate(options.scores, EvaluationOptions(**values))


def add_to(add_verb: AddVerb) -> None:
    """Add the subcommands of this module, with their options, through `add_verb`."""
    add = add_verb(inspect, "fledge inspect bundle")
    add.add_argument("bundle", type=Path, metavar="BUNDLE")
    add.add_argument("--json", action="store_true", help="print the manifest unchanged")

    add = add_verb(verify, "fledge verify bundle")
    add.add_argument("bundle", type=Path, metavar="BUNDLE")
    add.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda", "tensorrt"])

    add = add_verb(serve, "fledge serve bundle --port 3000")
    add.add_argument("bundle", type=Path, metavar="BUNDLE")
    add.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for every interface; default: 127.0.0.1",
    )
    add.add_argument("--port", type=int, default=3000, metavar="N", help="default: 3000")
    add.add_argument("--workers", type=int, metavar="N", help="processes; default: 1")
    _runtime_options(add, default=None)  # None: the environment variable applies

    add = add_verb(score, "fledge score photos --bundle bundle --out scores.csv")
    _score_options(add)
    _runtime_options(add, default="auto")

    add = add_verb(evaluate_scores, "fledge evaluate-scores scores.csv --labels-from-folders")
    _evaluate_scores_options(add)


def _runtime_options(add: argparse.ArgumentParser, default: str | None) -> None:
    add.add_argument("--device", default=default, choices=["auto", "cpu", "cuda", "tensorrt"])
    add.add_argument("--precision", default=default, choices=["auto", "fp32", "int8", "fp16"])


def _score_options(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="folders, images, globs, lists (.txt, .csv, …), archives (zip, tar), s3://…; "
        "- reads paths from standard input",
    )
    add.add_argument("--bundle", type=Path, help="the bundle to score with")
    add.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a .csv, .jsonl or .parquet file; with --engine ray also a folder of .parquet files",
    )
    add.add_argument("--column", metavar="NAME", help="column of a list that holds the paths")
    add.add_argument(
        "--addresses",
        default="",
        metavar="KINDS",
        help="kinds of addresses that lists may contain, such as s3,https; "
        "default: only those of the inputs",
    )
    add.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="read local files only within DIR, links followed; for lists from elsewhere",
    )
    add.add_argument("--tta", type=int, default=0, metavar="N", help="views to average; 0 is off")
    add.add_argument("--top-k", type=int, default=5, metavar="K", help="classes in a row")
    add.add_argument(
        "--probabilities",
        action="store_true",
        help="add a column with the probabilities of all classes",
    )
    add.add_argument(
        "--embeddings",
        action="store_true",
        help="add a column with the network's features; Parquet only",
    )
    csv_safe_option(add)
    add.add_argument(
        "--csv-bom",
        action="store_true",
        help="begin CSV with a byte-order mark, by which spreadsheets recognise UTF-8",
    )
    add.add_argument(
        "--copy-to",
        type=Path,
        metavar="DIR",
        help="copy every image there, into a folder for each label",
    )
    add.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="ray: use the cluster at RAY_ADDRESS, or start one here; needs ray",
    )
    add.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads, or actors of ray; default: one per core, with ray one per GPU",
    )
    add.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="rows (images times views) per run of the graph; default: as measured at export",
    )
    add.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="largest width times height of an image; default: FLEDGE_MAX_PIXELS, else 100000000",
    )
    add.add_argument("--max-errors", metavar="N|P%", help="exit 1 when more images are broken")
    add.add_argument(
        "--restart", action="store_true", help="discard the rows of an unfinished run, start anew"
    )


def csv_safe_option(add: argparse.ArgumentParser) -> None:
    """Add the option --csv-safe to a subcommand."""
    add.add_argument(
        "--csv-safe",
        action="store_true",
        help="put an apostrophe before texts in CSV that a spreadsheet takes for formulas",
    )


def _evaluate_scores_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("scores", type=Path, metavar="SCORES", help="a table of `fledge score`")
    truth = add.add_argument_group("the true labels: one of these")
    truth.add_argument(
        "--labels-from-folders",
        action="store_true",
        help="the folder that is a class of the model, also within an archive, is the label",
    )
    truth.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="a table with the columns path and label; matched by path, else by its unique end",
    )
    truth.add_argument("--labels-column", metavar="NAME", help="default: its usual name")
    truth.add_argument("--path-column", metavar="NAME", help="default: its usual name")
    add.add_argument(
        "--bundle", type=Path, help="take the labels' order from it; default: infer it from SCORES"
    )
    add.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    add.add_argument("--confusion", type=Path, metavar="FILE", help="write the matrix as CSV")
    add.add_argument(
        "--mistakes", type=Path, metavar="FILE", help="write wrong answers, most confident first"
    )
    csv_safe_option(add)
