"""The fine-tune, stage after stage, readable top to bottom."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from serving.errors import DataError, OptionError
from serving.files import write_aside
from training import data, lr_finder, model, options, pixels, trainer
from training.activations import Precision, TrainFeed, ValidFeed, affordable_views
from training.best import Best, Say
from training.console import say as say_aloud

ACTIVATION_BYTES: Final = 2 * 2**30


def run(
    recipe: options.Recipe,
    source: str,
    *,
    split: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    say: Say = say_aloud,
) -> Path:
    """Fine-tune by `recipe` on the photos of `source`; returns the run's folder.

    Args:
        recipe: What to do.
        source: As `data.load`.
        split: As `data.load`.
        out: The run's folder, new or empty; `runs/NAME` with a number where that is taken.
        device: "auto", "cpu" or "cuda".
        say: Takes lines for a person.

    Raises:
        FledgeError: Anything wrong with the request, before anything is written; a NaN loss.
    """
    started = time.perf_counter()
    precision = choose_precision(device, recipe.precision)
    dataset = data.load(
        source, split=split, fold=recipe.data.fold, valid=recipe.data.valid, seed=recipe.seed
    )
    torch.manual_seed(recipe.seed)
    classifier, pretrained = build_classifier(recipe, len(dataset.classes), say)
    _check_out(out)
    _check_size(classifier, recipe)
    dataset, train, valid = pixels.decode(dataset, recipe.preprocess, say)
    say(
        f"{len(dataset.classes)} classes, {len(train)} photos to train on, {len(valid)} to "
        f"validate; {recipe.arch} at {recipe.preprocess.size} px on {precision.device.type}, "
        f"{str(precision.dtype).removeprefix('torch.')}"
    )

    folder = _claim(out, recipe.name)
    _write_recipe(recipe, folder)
    data.write_split(dataset, folder / data.SPLIT)
    best = Best(folder, recipe, dataset, classifier, say)
    classifier.to(precision.device).to(memory_format=torch.channels_last)
    view = 0
    if not pretrained and any(_from_scratch(stage) != stage for stage in recipe.stage):
        say("no trained weights: every stage trains the whole network, at one rate")
    for stage in recipe.stage:
        if not pretrained:
            stage = _from_scratch(stage)
        classifier.fixed_norms = stage.batchnorm == "fixed"
        classifier.freeze_to(stage.unfreeze)
        classifier.eval()
        prefix = classifier.prefix
        wanted = min(stage.views, stage.epochs)
        size = recipe.preprocess.size
        views = affordable_views(wanted, len(train), prefix, size, precision, ACTIVATION_BYTES)
        feed = TrainFeed(
            train, prefix, recipe.preprocess, recipe.augment, precision, recipe.seed, view, views
        )
        view += views or stage.epochs
        if views < wanted and len(prefix):
            say(f"{stage.name:>8}  {views} of {wanted} views fit into {ACTIVATION_BYTES >> 30} GiB")
        keep = affordable_views(1, len(valid), prefix, size, precision, ACTIVATION_BYTES // 2) > 0
        held_out = ValidFeed(valid, prefix, recipe.preprocess, precision, keep)
        lr = _learning_rate(classifier, stage, recipe, feed, folder, say)
        trainer.train_stage(
            classifier,
            stage,
            lr,
            recipe.optimizer,
            feed,
            held_out,
            batch_size=recipe.batch_size,
            smoothing=recipe.label_smoothing,
            on_epoch=best.see,
        )
    result = best.finish(valid)
    _point_latest(folder)
    say(
        f"{folder}: validation accuracy {result.accuracy:.2%} (loss {result.loss:.4f}) after "
        f"{time.perf_counter() - started:.0f} s; next: fledge export {folder} --out bundle"
    )
    return folder


def build_classifier(
    recipe: options.Recipe, classes: int, say: Say
) -> tuple[model.Classifier, bool]:
    """The recipe's network, and whether its body comes with trained weights."""

    def build(weights: str) -> model.Classifier:
        return model.build(
            recipe.arch, classes, arch_args=recipe.arch_args, head=recipe.head, weights=weights
        )

    if recipe.weights != "auto":
        return build(recipe.weights), recipe.weights != "none"
    try:
        return build("imagenet"), True
    except DataError as error:
        say(f"warning: weights = 'auto': {error}; training from scratch")
        return build("none"), False


def choose_precision(device: str, precision: str) -> Precision:
    """Turn the device and precision asked for into what this machine has.

    Raises:
        OptionError: CUDA was asked for and is not there.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise OptionError("--device cuda: no usable GPU here; use --device cpu or auto")
    where = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    if precision == "auto":
        precision = "bf16" if _has_bf16(where) else "fp32"
    return Precision(torch.bfloat16 if precision == "bf16" else torch.float32, where)


def _has_bf16(where: torch.device) -> bool:
    """Whether bfloat16 is a sure gain: on CPUs its backward pass is at times ten times slower."""
    return where.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _learning_rate(
    classifier: model.Classifier,
    stage: options.Stage,
    recipe: options.Recipe,
    feed: TrainFeed,
    folder: Path,
    say: Say,
) -> float:
    if stage.lr != "find":
        return stage.lr
    curve = trainer.find_lr(
        classifier, stage, recipe.optimizer, feed, recipe.batch_size, recipe.label_smoothing
    )
    lr_finder.plot(curve, folder / f"lr_find-{stage.name}.png", f"lr_find before {stage.name}")
    say(
        f"{stage.name:>8}  lr_find: {curve.valley:.2e} (valley; steepest {curve.steepest:.2e}, "
        f"minimum {curve.minimum:.2e})"
    )
    return curve.valley


def _from_scratch(stage: options.Stage) -> options.Stage:
    """The stage for random weights: a frozen random body would teach the head nothing."""
    changes = {"unfreeze": options.ALL, "lr_divide": 1.0, "batchnorm": "train"}
    return stage.model_copy(update=changes)


def _check_out(out: Path | None) -> None:
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"--out {out} exists already; choose another or remove it")


def _claim(out: Path | None, name: str) -> Path:
    """Make the run's folder; two runs that start together get two."""
    if out is not None:
        _check_out(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


@torch.no_grad()
def _check_size(classifier: model.Classifier, recipe: options.Recipe) -> None:
    """Try one empty picture, before anything is written."""
    size = recipe.preprocess.size
    try:
        classifier.eval()(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:100]
        raise OptionError(
            f"preprocess.size = {size} does not fit {recipe.arch}: {reason}"
        ) from None


def _write_recipe(recipe: options.Recipe, folder: Path) -> None:
    import tomli_w

    values = recipe.model_dump(mode="json", exclude={"preprocess"})
    values["preprocess"] = asdict(recipe.preprocess)
    with write_aside(folder / "recipe.toml") as aside:
        aside.write_text(tomli_w.dumps(values))


def _point_latest(folder: Path) -> None:
    """Point `runs/latest` at a run in `runs/`; runs elsewhere are their owner's to name."""
    link = folder.parent / "latest"
    if folder.parent.name != "runs" or (link.exists() and not link.is_symlink()):
        return
    aside = folder.parent / f".latest.partial-{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name)
    aside.replace(link)
