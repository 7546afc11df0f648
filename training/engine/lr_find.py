"""Implementation of `fledge lr-find`: the learning-rate range test of one stage.

Optionally, the stage is then trained for a few epochs at each suggested learning rate.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

import torch

from serving.errors import OptionError, WorkError
from serving.utils.files import check_file, check_folder
from training.activations.loaders import TrainLoader, ValidLoader
from training.activations.sharing import plan_sharing
from training.activations.stage_loaders import StageLoaders
from training.config.schema import Recipe, Stage
from training.data.dataset import load_dataset
from training.engine import auto_batch_size, compile, epoch, plan
from training.models.classifier import Classifier
from training.optim import lr_range_test
from training.optim.optimizer import build_optimizer
from training.pixels.decoded import DecodedPhotos
from training.report import lr_plots
from training.run import checkpoint
from training.utils import disk_cache
from training.utils.console import Log, log_to_stderr
from training.utils.precision import Precision, choose_precision

PICKS: Final = get_args(lr_range_test.Pick)


@dataclass(frozen=True)
class LearningRateTrial:
    """Result of a short training at a suggested learning rate.

    Attributes:
        pick: Name of the suggestion, one of `PICKS`.
        lr: Suggested learning rate, used for the head.
        train_loss: Training loss of the last epoch in nats; NaN if the training diverged.
        valid_loss: Validation loss of the last epoch in nats; NaN if the training diverged.
        accuracy: Validation accuracy after the last epoch, as a fraction of 1; NaN if the training
            diverged.
    """

    pick: str
    lr: float
    train_loss: float
    valid_loss: float
    accuracy: float


@dataclass
class _StageSetup:
    """One stage of a recipe, with the network and the data loaders for training the stage."""

    recipe: Recipe
    stage: Stage
    classifier: Classifier
    train_loader: TrainLoader
    valid_loader: ValidLoader
    precision: Precision


def lr_find(
    recipe: Recipe,
    source: str,
    *,
    split: Path | None = None,
    stage: str | None = None,
    start: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    compare: int | None = None,
    cache_gb: float | None = None,
    log: Log = log_to_stderr,
) -> tuple[lr_range_test.Curve, list[LearningRateTrial]]:
    """Run the learning-rate range test of one stage, and write a plot of the loss curve.

    Args:
        recipe: The recipe.
        source: Value of `--data`: a folder of photos or the name of a dataset.
        split: Value of `--split`: a CSV file that assigns each photo to a fold. None: no such file.
        stage: Name of the stage. None: the first stage.
        start: Checkpoint that the stage starts from, such as `runs/NAME/stages/head.safetensors`.
            None: the weights that the recipe starts from.
        out: Path of the PNG file. None: `runs/lr-find-NAME/lr_find-STAGE.png`, where NAME is the
            name of the recipe.
        device: "auto", "cpu" or "cuda".
        compare: Number of epochs to train at each suggested rate. None: no such trials.
        cache_gb: Size limit of the disk cache in GB; None: see `disk_cache.budget_gb`.
        log: Function that is called with each log line.

    Returns:
        The loss curve, and the trials in the order of `PICKS`.

    Raises:
        FledgeError: An option or the data is wrong, the recipe has no stage of this name, or the
            loss diverges at once or never falls.
    """
    if compare is not None and compare < 1:
        raise OptionError(f"--epochs {compare}: use 1 or more")
    if out and out.suffix.lower() != ".png":
        raise OptionError(f"--out {out}: use a name that ends in .png")
    folder = Path("runs") / f"lr-find-{recipe.name}"
    if out:
        check_file(out)
    else:
        check_folder(folder)
    setup = _set_up(recipe, source, split, stage, start, device, cache_gb, log)
    name = setup.stage.name
    curve = epoch.find_lr(setup.classifier, setup.stage, setup.recipe, setup.train_loader)
    picked = curve.pick(recipe.lr_find.pick)
    if not out:
        folder.mkdir(parents=True, exist_ok=True)
    path = out or folder / f"lr_find-{name}.png"
    lr_plots.lr_find(curve, path, f"lr_find before {name}", recipe.lr_find.pick)
    log(f"{path}: the curve; recipe value: stage.{name}.lr={picked:.2e} ({recipe.lr_find.pick})")
    return curve, [] if compare is None else list(_trials(setup, curve, compare))


def _set_up(
    recipe: Recipe,
    source: str,
    split: Path | None,
    name: str | None,
    start: Path | None,
    device: str,
    cache_gb: float | None,
    log: Log,
) -> _StageSetup:
    precision = choose_precision(device, recipe.precision)
    compile.check(recipe, precision.device)
    dataset = load_dataset(source, split=split, config=recipe.data, seed=recipe.seed)
    for line in dataset.reading.lines():
        log(line)
    classifier, pretrained = plan.build_classifier(recipe, len(dataset.classes), log)
    stages = plan.stages_of(recipe, pretrained)
    plan.check(classifier, recipe, stages)
    stage = next((s for s in stages if s.name == name), stages[0] if name is None else None)
    if stage is None:
        names = ", ".join(s.name for s in stages)
        raise OptionError(f"--stage {name}: no such stage; the recipe has {names}")
    if start:
        trained, info = checkpoint.load(start)
        try:
            classifier.load_state_dict(trained.state_dict())
        except RuntimeError:
            raise OptionError(
                f"--from {start} does not fit: {_differences(info, plan.info(recipe, dataset))}"
            ) from None
    elif stage is not stages[0]:
        log(
            f"warning: stage {stage.name} starts without the stages before it; give a checkpoint "
            "with --from"
        )
    recipe = auto_batch_size.resolve_batch_size(recipe, classifier, stages, dataset, precision, log)
    photos = DecodedPhotos(dataset, recipe.data.presize, log, cache_gb)
    classifier.to(precision.device).to(memory_format=torch.channels_last)
    activations = StageLoaders(photos, recipe, precision, disk_cache.open_cache(cache_gb), log)
    (share,) = plan_sharing(classifier, recipe, [stage])
    classifier.freeze_for(stage)
    train_loader, valid_loader = activations.loaders(classifier, stage, share)
    return _StageSetup(recipe, stage, classifier, train_loader, valid_loader, precision)


def _differences(theirs: checkpoint.CheckpointInfo, ours: checkpoint.CheckpointInfo) -> str:
    """Return a text that lists the options in which the networks of two checkpoints differ."""

    def network_options(info: checkpoint.CheckpointInfo) -> dict[str, object]:
        tables = {"arch_args": info.arch_args, "head": info.head}
        options = {f"{name}.{key}": table[key] for name, table in tables.items() for key in table}
        return {"arch": info.arch, "classes": len(info.classes), **options}

    old, new = network_options(theirs), network_options(ours)
    keys = [key for key in {**old, **new} if _plain(old.get(key)) != _plain(new.get(key))]
    texts = (f"{key} is {_plain(old.get(key))} there, {_plain(new.get(key))} here" for key in keys)
    return ", ".join(texts) or "its weights have other shapes"


def _plain(value: object) -> str:
    """Return a value as text. Equal values from a .json file and from a recipe give equal texts."""
    return "none" if value is None else json.dumps(value).strip('"')


def _trials(
    setup: _StageSetup, curve: lr_range_test.Curve, epochs: int
) -> Iterator[LearningRateTrial]:
    """Train the stage for `epochs` epochs at each suggested rate, always from the same weights."""
    stage = setup.stage.model_copy(
        update={"cycles": 1, "cycle_len": epochs, "cycle_mult": 1.0, "patience": 0}
    )
    weights = copy.deepcopy(setup.classifier.state_dict())
    nan = float("nan")
    tried: dict[float, LearningRateTrial] = {}
    for pick in PICKS:
        lr = curve.pick(pick)
        if lr in tried:  # several suggestions may be limited to minimum / 10
            yield replace(tried[lr], pick=pick)
            continue
        setup.classifier.load_state_dict(weights)
        torch.manual_seed(setup.recipe.seed)
        optimizer = build_optimizer(setup.classifier, setup.recipe.optimizer, stage, lr)
        losses: list[float] = []
        try:
            for number in range(epochs):
                train_loss, _ = epoch.train_epoch(
                    setup.classifier, stage, setup.recipe, optimizer, setup.train_loader, number,
                    losses,
                )  # fmt: skip
                accuracy, valid_loss = epoch.validate(
                    setup.classifier, setup.valid_loader, setup.precision
                )
                losses.append(valid_loss)
            tried[lr] = LearningRateTrial(pick, lr, train_loss, valid_loss, accuracy)
        except WorkError:  # the rate is too large: a result, not an error
            tried[lr] = LearningRateTrial(pick, lr, nan, nan, nan)
        yield tried[lr]
    setup.classifier.load_state_dict(weights)
