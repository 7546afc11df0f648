"""The front door: one verb a function, each imports its room only when called."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

Verb = Callable[[argparse.Namespace], None]


def export(options: argparse.Namespace) -> None:
    """Turn a run's best checkpoint into a verified bundle."""
    from export import calibration, pipeline, torchvision_checkpoint
    from serving.errors import OptionError

    wanted = pipeline.ExportOptions(
        name=options.name,
        confident=calibration.ConfidenceTarget.parse(options.confident)
        if options.confident
        else None,
        precision=options.precision,
        accuracy_budget=options.accuracy_budget,
        sign=options.sign,
    )
    if options.checkpoint is None:
        for name in ("arch", "arch_args", "labels", "photos", "size", "crop"):
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise OptionError(f"{option} goes with --checkpoint FILE, not with a run")
        if options.run is None:
            raise OptionError("name a run, as runs/latest; or a torchvision --checkpoint FILE")
        pipeline.export(options.run, options.out, wanted, data=options.data)
    else:
        for name in ("arch", "labels", "photos"):
            if getattr(options, name) is None:
                raise OptionError(f"--checkpoint {options.checkpoint} needs --{name}, too")
        if options.run is not None or options.data is not None:
            raise OptionError("--checkpoint stands instead of a run and its --data; leave one out")
        pipeline.export_checkpoint(
            options.checkpoint,
            options.out,
            wanted,
            arch=options.arch,
            arch_args=torchvision_checkpoint.read_args(options.arch_args or ()),
            labels=options.labels,
            photos=options.photos,
            size=options.size,
            crop=options.crop,
        )
    if options.register:
        from export import bentoml_store

        bentoml_store.register(options.out)


def inspect(options: argparse.Namespace) -> None:
    """Say what a bundle holds, after checking every byte of it; --json prints the manifest."""
    from serving.bundle import inspect as room
    from serving.bundle import storage

    if options.json:
        print(storage.read(options.bundle).manifest.to_json(), end="")
        return
    for line in room.describe(options.bundle):
        print(line)


def verify(options: argparse.Namespace) -> None:
    """Check a bundle's bytes, and its golden images through the runtime. Needs no torch."""
    from serving.inference import verify as room

    for line in room.verify(options.bundle, options.device):
        print(line)


def serve(options: argparse.Namespace) -> None:
    """Serve a bundle over HTTP."""
    from serving.server import launch

    launch.serve(
        options.bundle,
        host=options.host,
        port=options.port,
        device=options.device,
        precision=options.precision,
        workers=options.workers,
    )


def score(options: argparse.Namespace) -> None:
    """Score many images into one table, a row each; killed and called again it goes on."""
    from dataclasses import fields

    from serving.scoring import score as room

    given = {one.name: getattr(options, one.name) for one in fields(room.ScoringOptions)}
    room.score(options.inputs, options.bundle, options.out, room.ScoringOptions(**given))


def evaluate_scores(options: argparse.Namespace) -> None:
    """Check a table of scores against true labels: accuracy, confusions, log loss; no model."""
    from serving.evaluation import evaluate_scores as room

    given = {name: getattr(options, name) for name in room.EvaluationOptions.__dataclass_fields__}
    room.evaluate(options.scores, room.EvaluationOptions(**given))


def _parser() -> argparse.ArgumentParser:
    from serving import __version__  # not at the top, as in `main`

    parser = argparse.ArgumentParser(
        prog="fledge",
        description="Fine-tune an image classifier, export it proven equal, serve it over HTTP.",
        epilog="a first walk: fledge train training/recipes/demo.toml --data sample; "
        "fledge export runs/latest --out bundle; fledge serve bundle",
    )
    parser.add_argument("--version", action="version", version=f"fledge {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(function: Verb, example: str, *, overrides: bool = False) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").splitlines()[0]
        name = function.__name__.replace("_", "-")
        added = verbs.add_parser(name, help=text, description=text, epilog=f"example: {example}")
        added.set_defaults(verb=function, verb_name=name, takes_overrides=overrides, overrides=[])
        added.add_argument("--debug", action="store_true", help="show tracebacks")
        return added

    def runtime_options(command: argparse.ArgumentParser, default: str | None = "auto") -> None:
        devices, precisions = ["auto", "cpu", "cuda", "tensorrt"], ["auto", "fp32", "int8", "fp16"]
        command.add_argument("--device", default=default, choices=devices)
        command.add_argument("--precision", default=default, choices=precisions)

    with suppress(ModuleNotFoundError):  # an image that only serves has no training/
        from training.cli import train as training_verbs  # not at the top, as in `main`

        training_verbs.add_to(verb)

    add = verb(export, "fledge export runs/latest --out bundle")
    add.add_argument("run", type=Path, nargs="?", metavar="RUN")
    add.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    add.add_argument("--data", type=Path, metavar="DIR", help="where the photos are now")
    foreign = add.add_argument_group("a torchvision checkpoint that you already have, not a run")
    builder = "of torchvision's builder, as transform_input=true"
    foreign.add_argument("--checkpoint", type=Path, metavar="FILE", help=".pth or .safetensors")
    foreign.add_argument("--arch", metavar="NAME", help="torchvision's name for the network")
    foreign.add_argument("--arch-args", nargs="+", metavar="KEY=VALUE", help=builder)
    foreign.add_argument("--labels", type=Path, metavar="FILE", help="a class name a line")
    foreign.add_argument("--photos", type=Path, metavar="DIR", help="a folder a class, held out")
    foreign.add_argument("--size", type=int, metavar="PX", help="of its images; default: 224")
    foreign.add_argument("--crop", type=float, metavar="SHARE", help="default: 0.875")
    add.add_argument("--name", help="the model's name; default: the recipe's")
    confident = "precision=P or coverage=C: what a confident answer is; default: none is said to be"
    add.add_argument("--confident", metavar="KIND=SHARE", help=confident)
    tried = "auto tries what this machine can run and keeps what is worth it; default: auto"
    add.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "int8", "fp16"], help=tried
    )
    budget = "accuracy that a faster precision may cost; default: 0.5"
    add.add_argument("--accuracy-budget", type=float, default=0.5, metavar="POINTS", help=budget)
    signs = "sign the manifest with this Ed25519 private key, PEM; FLEDGE_TRUSTED_KEYS checks it"
    add.add_argument("--sign", type=Path, metavar="KEY", help=signs)
    stored = "put the bundle into BentoML's model store, too"
    add.add_argument("--register", action="store_true", help=stored)

    add = verb(inspect, "fledge inspect bundle")
    add.add_argument("bundle", type=Path, metavar="BUNDLE")
    add.add_argument("--json", action="store_true", help="the manifest as it is")

    add = verb(verify, "fledge verify bundle")
    add.add_argument("bundle", type=Path, metavar="BUNDLE")
    add.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda", "tensorrt"])

    add = verb(serve, "fledge serve bundle --port 3000")
    add.add_argument("bundle", type=Path, metavar="BUNDLE")
    where = "address to listen on; 0.0.0.0 for every interface; default: 127.0.0.1"
    add.add_argument("--host", default="127.0.0.1", help=where)
    add.add_argument("--port", type=int, default=3000, metavar="N", help="default: 3000")
    add.add_argument("--workers", type=int, metavar="N", help="processes; default: 1")
    runtime_options(add, default=None)  # none given: the environment decides

    add = verb(score, "fledge score photos --bundle bundle --out scores.csv")
    what = "folders, images, globs, lists (.txt, .csv, …), tar archives, s3://…; - reads paths"
    add.add_argument("inputs", nargs="+", metavar="INPUT", help=what)
    add.add_argument("--bundle", type=Path, required=True)
    table = ".csv, .jsonl or .parquet; with ray also a folder of .parquet files"
    add.add_argument("--out", type=Path, required=True, metavar="FILE", help=table)
    add.add_argument("--column", metavar="NAME", help="of a list, that has the paths")
    may = "addresses that lists may have, too: s3,https; else those of the inputs alone"
    add.add_argument("--addresses", default="", metavar="KINDS", help=may)
    add.add_argument("--tta", type=int, default=0, metavar="N", help="views to average")
    add.add_argument("--top-k", type=int, default=5, metavar="K")
    every = "a column with the probabilities of all classes"
    add.add_argument("--probabilities", action="store_true", help=every)
    add.add_argument("--embeddings", action="store_true", help="the network's features; Parquet")
    sorts = "copy every image there, into a folder for each label"
    add.add_argument("--copy-to", type=Path, metavar="DIR", help=sorts)
    where = "ray: on a cluster, that of RAY_ADDRESS or one of this machine; needs fledge[ray]"
    add.add_argument("--engine", default="local", choices=["local", "ray"], help=where)
    threads = "threads, or actors of ray; default: one a core, or a GPU of ray's"
    add.add_argument("--workers", type=int, metavar="N", help=threads)
    rows = "images times views of one run of the graph; default: as measured at export"
    add.add_argument("--batch", type=int, metavar="N", help=rows)
    add.add_argument("--max-errors", metavar="N|P%", help="exit 1 when more images are broken")
    again = "begin anew, whatever an unfinished run has left"
    add.add_argument("--restart", action="store_true", help=again)
    runtime_options(add)

    add = verb(evaluate_scores, "fledge evaluate-scores scores.csv --labels-from-folders")
    add.add_argument("scores", type=Path, metavar="SCORES", help="a table of `fledge score`")
    truth = add.add_argument_group("the true labels: one of these")
    folders = "the folder that an image lies in, here or within its archive, is its label"
    truth.add_argument("--labels-from-folders", action="store_true", help=folders)
    table = "a CSV with the columns path and label; by path, else by a file name that is there once"
    truth.add_argument("--labels", type=Path, metavar="FILE", help=table)
    truth.add_argument("--labels-column", metavar="NAME", help="default: label")
    truth.add_argument("--path-column", metavar="NAME", help="default: path")
    add.add_argument("--bundle", type=Path, help="tells the labels; else they are learnt")
    add.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    add.add_argument("--confusion", type=Path, metavar="FILE", help="the confusion matrix, CSV")
    add.add_argument("--mistakes", type=Path, metavar="FILE", help="wrong answers, surest first")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    0 done, 1 the work failed or fell short of a gate, 2 the request was wrong, 78 no usable
    bundle, 130 interrupted.
    """
    # Not at the top: `bentoml serve fledge:latest` looks for a module of this name before it looks
    # for a Bento, and the `serving` that it ran would be this one instead of the Bento's own.
    from serving.errors import FledgeError, OptionError

    # OpenMP threads that spin while they wait take a core from whoever else has work here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.takes_overrides and getattr(options, "recipe", "") is None:
            # Some versions of argparse pass over an optional word that stands behind options.
            word = next((w for w in rest if "=" not in w and not w.startswith("-")), None)
            if word is not None:
                rest.remove(word)
                options.recipe = Path(word)
        for word in rest:
            if not options.takes_overrides or word.startswith("-") or "=" not in word:
                raise OptionError(f"{word!r} is no option of fledge {options.verb_name}")
        options.overrides = rest
        options.verb(options)
    except FledgeError as error:
        if options.debug:
            traceback.print_exc()
        print(f"fledge: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("fledge: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        if options.debug:
            raise
        print(
            f"fledge: {error.name} is not installed; training and export need "
            "`pip install 'fledge[train]'`",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        if options.debug:
            raise
        place = f" {error.filename}:" if error.filename else ""
        print(f"fledge:{place} {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def program() -> None:
    """`main` as a program of its own: what it does once a process, and how it ends."""
    # Imports make objects by the hundred thousand, all to stay: looking through them for garbage
    # every 700 of them, which is the default, is a sixth of the start of `fledge train`.
    gc.set_threshold(10_000)
    status = main()
    if "torch" in sys.modules:
        from serving.utils.ending import end

        end(status)  # taking all of torch apart takes a second; the system does it at once
    sys.exit(status)


if __name__ == "__main__":
    program()
