"""Define the subcommand `fledge export`. Torch is imported only when the subcommand runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from serving.cli import AddVerb

DEFAULT_OUT: Final = Path("bundle")
_OF_CHECKPOINTS: Final = ("arch", "arch_args", "labels", "crop")


def export(options: argparse.Namespace) -> None:
    """Turn a run's best checkpoint into a verified bundle."""
    from export import calibration, pipeline, torchvision_checkpoint
    from serving.errors import OptionError
    from serving.inputs.path_kind import require

    if options.sizes is not None:
        _compare_sizes(options)
        return
    if options.json is not None:
        raise OptionError("--json goes with --sizes")
    out = options.out or DEFAULT_OUT
    export_options = pipeline.ExportOptions(
        name=options.name,
        confident=calibration.ConfidenceTarget.parse(options.confident)
        if options.confident
        else None,
        precision=options.precision,
        accuracy_budget=options.accuracy_budget,
        sign=options.sign,
    )
    if options.checkpoint is None:
        for name in _OF_CHECKPOINTS:
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise OptionError(f"{option} goes with --checkpoint FILE, not with a run")
        if options.run is None:
            raise OptionError("name a run, as runs/latest; or a torchvision --checkpoint FILE")
        require(options.run, "run")
        pipeline.export(
            options.run,
            out,
            export_options,
            data=options.data,
            photos=options.photos,
            folds=options.folds or (),
            size=options.size,
        )
    else:
        for name in ("arch", "labels", "photos"):
            if getattr(options, name) is None:
                raise OptionError(f"--checkpoint {options.checkpoint} needs --{name}, too")
        if options.folds:
            raise OptionError("--folds goes with a run, not with --checkpoint FILE")
        if options.run is not None or options.data is not None:
            raise OptionError("--checkpoint replaces a run and its --data; leave one out")
        pipeline.export_checkpoint(
            options.checkpoint,
            out,
            export_options,
            arch=options.arch,
            arch_args=torchvision_checkpoint.read_args(options.arch_args or ()),
            labels=options.labels,
            photos=options.photos,
            size=options.size,
            crop=options.crop,
        )
    if options.register:
        from export import bentoml_store

        bentoml_store.register(out)


def _compare_sizes(options: argparse.Namespace) -> None:
    """Print a table of input sizes, and the command that exports the run at the advised one."""
    from export.input_size import choose, table
    from serving.errors import OptionError
    from serving.inputs.path_kind import require
    from serving.terminal import show
    from serving.utils.files import atomic_write, check_file

    if options.run is None:
        raise OptionError("--sizes goes with a run, as fledge export runs/latest --sizes 192,224")
    unused = (*_OF_CHECKPOINTS, "checkpoint", "size", "out", "name", "confident", "sign")
    given = [name for name in unused if getattr(options, name) is not None]
    given += ["register"] if options.register else []
    given += ["precision"] if options.precision != "auto" else []
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise OptionError(f"{option} goes with an export; --sizes writes no bundle: leave one out")
    sizes = table.parse(options.sizes)
    if options.json is not None:
        check_file(options.json, "--json")
    require(options.run, "run")
    photos = {"data": options.data, "photos": options.photos, "folds": options.folds or ()}
    found = choose.compare_sizes(options.run, sizes, budget=options.accuracy_budget, **photos)
    for line in table.lines(found):
        show(line)
    advised = found.advised.size
    command = table.command(
        options.run,
        None if advised == found.trained else advised,
        budget=options.accuracy_budget,
        **photos,
    )
    if options.json is not None:
        figures = found.to_dict() | {"advised": advised}
        with atomic_write(options.json) as partial:
            partial.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
        show(f"wrote {options.json}")
    show(f"next: {command}")


def add_to(add_verb: AddVerb) -> None:
    """Add the subcommand `fledge export` and its options to the command line."""
    add = add_verb(export, "fledge export runs/latest --out bundle")
    add.add_argument("run", type=Path, nargs="?", metavar="RUN")
    add.add_argument("--out", type=Path, metavar="BUNDLE", help="default: bundle")
    add.add_argument("--data", type=Path, metavar="DIR", help="the photos, if they were moved")
    add.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="photos that the network was not trained on, one folder per class, or a zip or tar: "
        "more of them for judging int8, fp16 and sizes, or with --checkpoint all of them",
    )
    add.add_argument(
        "--folds",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="runs of the other folds (data.folds) of the same recipe: int8, fp16 and sizes are "
        "judged on the held-out photos of all",
    )
    add.add_argument(
        "--size",
        type=int,
        metavar="PX",
        help="side of the network's input, if not that of the training: kept unless it surely "
        "costs more accuracy than --accuracy-budget; with --checkpoint that of the training",
    )
    add.add_argument(
        "--sizes",
        metavar="PX,PX",
        help="compare input sizes, such as 160,192,224,256: a table of accuracy and speed, and "
        "no bundle",
    )
    add.add_argument("--json", type=Path, metavar="FILE", help="write all figures of --sizes")
    checkpoint = add.add_argument_group("a torchvision checkpoint instead of a run")
    checkpoint.add_argument("--checkpoint", type=Path, metavar="FILE", help=".pth or .safetensors")
    checkpoint.add_argument("--arch", metavar="NAME", help="torchvision's name of the network")
    checkpoint.add_argument(
        "--arch-args",
        nargs="+",
        metavar="KEY=VALUE",
        help="arguments of torchvision's builder, such as transform_input=true",
    )
    checkpoint.add_argument(
        "--labels", type=Path, metavar="FILE", help="text file with one class name per line"
    )
    checkpoint.add_argument(
        "--crop", type=float, metavar="SHARE", help="share of the short side kept; default: 0.875"
    )
    add.add_argument("--name", help="the model's name; default: the recipe's")
    add.add_argument(
        "--confident",
        metavar="KIND=SHARE",
        help="precision=P or coverage=C: choose the confidence threshold that reaches it; "
        "default: no threshold",
    )
    add.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "int8", "fp16"],
        help="auto tries what this machine can run, and keeps what is faster and surely accurate "
        "enough; int8 or fp16 is kept unless it is surely not; default: auto",
    )
    add.add_argument(
        "--accuracy-budget",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="accuracy that a faster precision or --size may cost, as sure as 95 %%; default: 0.5",
    )
    add.add_argument(
        "--sign",
        type=Path,
        metavar="KEY",
        help="sign the manifest with this Ed25519 private key (PEM); FLEDGE_TRUSTED_KEYS checks it",
    )
    add.add_argument(
        "--register", action="store_true", help="also put the bundle into BentoML's model store"
    )
