"""`fledge lr-find`: the range test alone, and on request a short training with each suggestion."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

import torch

from serving.errors import OptionError, WorkError
from serving.utils.files import check_file
from training.activations.cache import ActivationCache
from training.activations.loaders import TrainLoader, ValidLoader
from training.activations.sharing import shares
from training.config.schema import Recipe, Stage
from training.data.dataset import load_dataset
from training.engine import auto_batch_size, compile, plan
from training.engine import epoch as trainer
from training.models.classifier import Classifier
from training.optim import lr_range_test
from training.optim import optimizer as optim
from training.pixels import decoded
from training.report import lr_plots
from training.run import checkpoint
from training.utils import disk_cache
from training.utils.console import Log
from training.utils.console import log_to_stderr as say_aloud
from training.utils.precision import Precision, choose_precision

PICKS: Final = get_args(lr_range_test.Pick)


@dataclass(frozen=True)
class LearningRateTrial:
    """What a short training with one suggestion came to.

    losses: of training and validation after it, NaN where it diverged; accuracy: a fraction of 1.
    """

    pick: str
    lr: float
    train_loss: float
    valid_loss: float
    accuracy: float


@dataclass
class _Bench:
    """One stage, ready to train."""

    recipe: Recipe
    stage: Stage
    classifier: Classifier
    feed: TrainLoader
    held_out: ValidLoader
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
    log: Log = say_aloud,
) -> tuple[lr_range_test.Curve, list[LearningRateTrial]]:
    """Range test of one stage of a recipe; nothing is kept but the picture.

    Args:
        recipe, source, split, device, cache_gb, say: As `recipe.run`.
        stage: Name of the stage; the first unless said.
        start: Checkpoint that the stage starts from, such as `runs/NAME/stages/head.safetensors`.
        out: Where the PNG goes; `lr_find-STAGE.png` here unless said.
        compare: Epochs to train with each suggestion; not given, nothing is compared.

    Returns:
        The curve, and the trials in the order of `PICKS`.

    Raises:
        FledgeError: As `recipe.run`; a stage that is not there; a curve that says nothing.
    """
    if compare is not None and compare < 1:
        raise OptionError(f"--epochs {compare}: use 1 or more")
    if out and out.suffix.lower() != ".png":
        raise OptionError(f"--out {out}: use a name that ends in .png")
    check_file(out or Path("lr_find.png"))
    bench = _bench(recipe, source, split, stage, start, device, cache_gb, log)
    name = bench.stage.name
    curve = trainer.find_lr(bench.classifier, bench.stage, bench.recipe, bench.feed)
    picked = curve.pick(recipe.lr_find.pick)
    path = out or Path(f"lr_find-{name}.png")
    lr_plots.lr_find(curve, path, f"lr_find before {name}", recipe.lr_find.pick)
    log(f"{path}: the curve; recipe value: stage.{name}.lr={picked:.2e} ({recipe.lr_find.pick})")
    return curve, [] if compare is None else list(_trials(bench, curve, compare))


def _bench(
    recipe: Recipe,
    source: str,
    split: Path | None,
    name: str | None,
    start: Path | None,
    device: str,
    cache_gb: float | None,
    log: Log,
) -> _Bench:
    precision = choose_precision(device, recipe.precision)
    compile.check(recipe, precision.device)
    dataset = load_dataset(source, split=split, config=recipe.data, seed=recipe.seed)
    classifier, pretrained = plan.build_classifier(recipe, len(dataset.classes), log)
    stages = plan.stages_of(recipe, pretrained)
    plan.check(classifier, recipe, stages)
    stage = next((s for s in stages if s.name == name), stages[0] if name is None else None)
    if stage is None:
        have = ", ".join(s.name for s in stages)
        raise OptionError(f"--stage {name}: the recipe has {have}")
    if start:
        trained, info = checkpoint.load(start)
        try:
            classifier.load_state_dict(trained.state_dict())
        except RuntimeError:
            raise OptionError(
                f"--from {start} does not fit: {_differs(info, plan.info(recipe, dataset))}"
            ) from None
    elif stage is not stages[0]:
        log(f"warning: the stages before {stage.name} have not been trained; start with --from")
    recipe = auto_batch_size.settle(recipe, classifier, stages, dataset, precision, log)
    photos = decoded.Photos(dataset, recipe.data.presize, log, cache_gb)
    classifier.to(precision.device).to(memory_format=torch.channels_last)
    activations = ActivationCache(photos, recipe, precision, disk_cache.open_cache(cache_gb), log)
    (share,) = shares(classifier, recipe, [stage])
    classifier.freeze_for(stage)
    feed, held_out = activations.feeds(classifier, stage, share)
    return _Bench(recipe, stage, classifier, feed, held_out, precision)


def _differs(theirs: checkpoint.CheckpointInfo, ours: checkpoint.CheckpointInfo) -> str:
    """What two networks differ in."""

    def facts(info: checkpoint.CheckpointInfo) -> dict[str, object]:
        tables = {"arch_args": info.arch_args, "head": info.head}
        options = {f"{name}.{key}": table[key] for name, table in tables.items() for key in table}
        return {"arch": info.arch, "classes": len(info.classes), **options}

    old, new = facts(theirs), facts(ours)
    keys = [key for key in {**old, **new} if _plain(old.get(key)) != _plain(new.get(key))]
    told = (f"{key} is {_plain(old.get(key))} there, {_plain(new.get(key))} here" for key in keys)
    return ", ".join(told) or "its weights are of other shapes"


def _plain(value: object) -> str:
    """A value of a recipe, the same whether it comes from a checkpoint's file or from a recipe."""
    return "none" if value is None else json.dumps(value).strip('"')


def _trials(bench: _Bench, curve: lr_range_test.Curve, epochs: int) -> Iterator[LearningRateTrial]:
    """Train the stage for some epochs from the same start with each suggestion."""
    brief = bench.stage.model_copy(
        update={"cycles": 1, "cycle_len": epochs, "cycle_mult": 1.0, "patience": 0}
    )
    weights = copy.deepcopy(bench.classifier.state_dict())
    nan = float("nan")
    tried: dict[float, LearningRateTrial] = {}
    for pick in PICKS:
        lr = curve.pick(pick)
        if lr in tried:  # suggestions past minimum / 10 are cut to it
            yield replace(tried[lr], pick=pick)
            continue
        bench.classifier.load_state_dict(weights)
        torch.manual_seed(bench.recipe.seed)
        optimizer = optim.build(bench.classifier, bench.recipe.optimizer, brief, lr)
        losses: list[float] = []
        try:
            for epoch in range(epochs):
                train_loss, _ = trainer.train_epoch(
                    bench.classifier, brief, bench.recipe, optimizer, bench.feed, epoch, losses
                )
                accuracy, valid_loss = trainer.validate(
                    bench.classifier, bench.held_out, bench.precision
                )
                losses.append(valid_loss)
            tried[lr] = LearningRateTrial(pick, lr, train_loss, valid_loss, accuracy)
        except WorkError:  # the rate was too large: that is what is to be shown
            tried[lr] = LearningRateTrial(pick, lr, nan, nan, nan)
        yield tried[lr]
    bench.classifier.load_state_dict(weights)
