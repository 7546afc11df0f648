"""The fine-tune, stage after stage, readable top to bottom."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from serving.errors import DataError, WorkError
from training import (
    best,
    checkpoint,
    data,
    evaluate,
    model,
    optim,
    pixels,
    plan,
    plots,
    report,
    run_folder,
    state,
)
from training import trainer as loop
from training.activations import TrainFeed, feeds
from training.console import Say
from training.console import say as say_aloud
from training.ema import Ema
from training.journal import Journal, read_steps
from training.options import Recipe, Stage
from training.precision import Precision, choose_precision
from training.state import Position


@dataclass
class Run:
    """A fine-tune in progress: what every stage of it works with."""

    recipe: Recipe
    stages: list[Stage]
    classifier: model.Classifier
    photos: pixels.Photos
    folder: Path
    precision: Precision
    info: checkpoint.CheckpointInfo
    say: Say
    position: Position = field(default_factory=Position)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def run(
    recipe: Recipe,
    source: str,
    *,
    split: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    cache_gb: float | None = None,
    say: Say = say_aloud,
) -> Path:
    """Fine-tune by `recipe` on the photos of `source`; returns the run's folder.

    Args:
        recipe: What to do.
        source: As `data.load`.
        split: As `data.load`.
        out: The run's folder, new or empty; `runs/NAME` with a number where that is taken.
        device: "auto", "cpu" or "cuda".
        cache_gb: Budget of what is kept between runs, in GB; as `cache.wanted`.
        say: Takes lines for a person.

    Raises:
        FledgeError: Anything wrong with the request, before anything is written; a NaN loss.
    """
    run_folder.check_free(out)
    precision = choose_precision(device, recipe.precision)
    dataset = data.load(source, split=split, config=recipe.data, seed=recipe.seed)
    classifier, pretrained = plan.build_classifier(recipe, len(dataset.classes), say)
    stages = plan.stages_of(recipe, pretrained)
    plan.check(classifier, recipe, stages)
    photos = pixels.Photos(dataset, say, cache_gb)
    photos.at(recipe.preprocess_of(stages[0]))
    dataset = photos.dataset
    if dataset.unlabelled:
        say(f"{len(dataset.unlabelled)} unlabelled photos: score them with fledge score")
    if not pretrained and stages != plan.stages_of(recipe, True):
        say("no trained weights: every stage trains the whole network, at one rate")
    folder = run_folder.claim(out, recipe.name)
    begun = run_folder.Begun(
        source=dataset.source,
        root=str(dataset.root),
        fingerprint=dataset.fingerprint,
        classes=dataset.classes,
        pretrained=pretrained,
        device=device,
        versions=checkpoint.versions(),
    )
    run_folder.begin(folder, recipe, dataset, begun)
    info = plan.info(recipe, dataset)
    return _go(Run(recipe, stages, classifier, photos, folder, precision, info, say))


def resume(
    folder: Path,
    *,
    device: str | None = None,
    root: Path | None = None,
    cache_gb: float | None = None,
    say: Say = say_aloud,
) -> Path:
    """Go on with a run that was killed or interrupted, from its last finished epoch.

    On the same machine with as many threads it ends with the same weights, bit for bit, as a run
    that was never interrupted.

    Args:
        folder: The run's folder.
        device: Another one than the run began with.
        root: Where the photos are now, if they have moved.
        cache_gb: As `run`.
        say: Takes lines for a person.

    Raises:
        DataError: No run there that got going, or its photos are no longer what they were.
    """
    recipe, begun = run_folder.read(folder)
    if not (folder / run_folder.LAST).exists():
        say(f"{folder} is finished already; next: fledge export {folder} --out bundle")
        return folder
    precision = choose_precision(device or begun.device, recipe.precision)
    where = (root or Path(begun.root)).resolve()
    dataset = data.from_split_file(folder / data.SPLIT, where, begun.classes, begun.source)
    begin_again = not (folder / run_folder.LAST / state.STATE).exists()
    weights = {"auto": "imagenet" if begun.pretrained else "none"}.get(
        recipe.weights, recipe.weights
    )
    built = recipe.model_copy(update={"weights": weights if begin_again else "none"})
    classifier, _ = plan.build_classifier(built, len(begun.classes), say)
    stages = plan.stages_of(recipe, begun.pretrained)
    found = state.load(folder / run_folder.LAST, precision.device)
    position, tensors = found or (Position(), {})
    photos = pixels.Photos(dataset, say, cache_gb)
    photos.at(recipe.preprocess_of(stages[min(position.stage, len(stages) - 1)]))
    if photos.dataset.fingerprint != begun.fingerprint:
        raise DataError(
            f"--resume {folder}: the photos in {where} are no longer those that the run began "
            "with; put them back, or start anew"
        )
    if found:
        classifier.load_state_dict(tensors.pop("model"))
        say(f"{folder}: going on after {len(position.history)} finished epochs")
    info = plan.info(recipe, dataset)
    return _go(
        Run(recipe, stages, classifier, photos, folder, precision, info, say, position, tensors)
    )


def _go(run: Run) -> Path:
    started = time.perf_counter()
    recipe, position = run.recipe, run.position
    dataset = run.photos.dataset
    run.say(
        f"{len(dataset.classes)} classes, {len(dataset.train)} photos to train on, "
        f"{len(dataset.valid)} to validate; {recipe.arch} at {recipe.preprocess.size} px on "
        f"{run.precision.device.type}, {str(run.precision.dtype).removeprefix('torch.')}"
    )
    run.classifier.to(run.precision.device).to(memory_format=torch.channels_last)
    journal = Journal(run.folder, position.history)
    ema = Ema(run.classifier, recipe.optimizer.ema) if recipe.optimizer.ema else None
    if ema and "ema" in run.tensors:
        ema.load(run.tensors["ema"])
    try:
        while position.stage < len(run.stages):
            _stage(run, journal, ema)
        result = best.finish(run.folder, dataset, recipe.tta, run.say)
        report.write(run.folder, say=run.say, tta=recipe.tta, result=result)
    except (KeyboardInterrupt, OSError, WorkError) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
        run.say(
            f"{why}: {len(position.history)} finished epochs are kept; go on with: "
            f"fledge train --resume {run.folder}"
        )
        raise
    run_folder.close(run.folder)
    run_folder.point_latest(run.folder)
    accuracy, loss = evaluate.score(result.plain, result.labels)
    views = f", {result.accuracy:.2%} over {result.views} views" if result.views > 1 else ""
    run.say(
        f"{run.folder}: validation accuracy {accuracy:.2%} (loss {loss:.4f}){views} after "
        f"{time.perf_counter() - started:.0f} s; look at {run.folder / report.REPORT}; "
        f"next: fledge export {run.folder} --out bundle"
    )
    return run.folder


def _stage(run: Run, journal: Journal, ema: Ema | None) -> None:
    """Train one stage, from wherever it stands, and step on to the next."""
    recipe, classifier, position = run.recipe, run.classifier, run.position
    stage = run.stages[position.stage]
    preprocess = recipe.preprocess_of(stage)
    feed, held_out = feeds(
        classifier, run.photos, stage, recipe, run.precision, position.first_view, run.say, ema
    )
    lr = stage.lr if stage.lr != "find" else position.lr
    if lr is None:
        lr = position.lr = _find_lr(run, stage, feed)
    optimizer = optim.build(classifier, recipe.optimizer, stage, lr)
    if "optimizer" in run.tensors:
        state.into_optimizer(optimizer, run.tensors.pop("optimizer"))
    averaged = ema.swapped if ema else nullcontext
    while position.epoch < stage.epochs and not plan.over_fitting(
        position.losses(stage.name), stage.patience
    ):
        started = time.perf_counter()
        losses = position.losses(stage.name)
        train_loss, steps = loop.train_epoch(
            classifier, stage, recipe, optimizer, feed, position.epoch, losses, ema
        )
        with averaged():
            accuracy, valid_loss = loop.validate(classifier, held_out, run.precision)
            if not math.isfinite(valid_loss):
                raise WorkError(
                    f"stage {stage.name}: the validation loss is {valid_loss} after epoch "
                    f"{position.epoch + 1}, rate {steps[-1].lr[-1]:.3g}; "
                    f"lower stage.{stage.name}.lr"
                )
            position.epoch += 1
            row = loop.Epoch(
                stage.name, position.epoch, steps[-1].lr[-1], train_loss, valid_loss, accuracy,
                time.perf_counter() - started,
            )  # fmt: skip
            if best.rank(row) > position.best:
                position.best = best.rank(row)
                best.save(run.folder, row, classifier, run.info, preprocess)
        position.history.append(row)
        journal.add(row, steps)
        _tell(run, row)
        if stage.patience and valid_loss < min(losses, default=math.inf):
            # Clones: the weights themselves go on moving.
            run.tensors["kept"] = {k: v.clone() for k, v in classifier.state_dict().items()}
            run.tensors["kept_ema"] = {k: v.clone() for k, v in ema.state().items()} if ema else {}
        _save(run, ema, optimizer)
    if stage.patience:
        classifier.load_state_dict(run.tensors.pop("kept"))
        kept = run.tensors.pop("kept_ema", {})
        if ema and kept:
            ema.load(kept)
    with averaged():
        info = replace(run.info, preprocess=preprocess, metrics={"stage": stage.name})
        checkpoint.save(
            run.folder / run_folder.STAGES / f"{stage.name}.safetensors", classifier, info
        )
    position.first_view += feed.views or stage.epochs
    position.stage, position.epoch, position.lr = position.stage + 1, 0, None
    schedule_png = run.folder / "schedule.png"
    plots.schedule(plots.rows(read_steps(run.folder)), schedule_png, f"{recipe.name}: as run")
    _save(run, ema, None)


def _find_lr(run: Run, stage: Stage, feed: TrainFeed) -> float:
    curve = loop.find_lr(run.classifier, stage, run.recipe, feed)
    pick = run.recipe.lr_find.pick
    picked = curve.pick(pick)
    path = run.folder / f"lr_find-{stage.name}.png"
    plots.lr_find(curve, path, f"lr_find before {stage.name}", pick)
    run.say(
        f"{stage.name:>8}  lr_find: {picked:.2e} ({pick}; steepest "
        f"{curve.steepest:.2e}, minimum {curve.minimum:.2e})"
    )
    return picked


def _save(run: Run, ema: Ema | None, optimizer: torch.optim.Optimizer | None) -> None:
    """Everything a resumed run needs, in one file, before the next epoch begins."""
    groups = {"model": run.classifier.state_dict()}
    if ema:
        groups["ema"] = ema.state()
    if optimizer:
        groups["optimizer"] = state.of_optimizer(optimizer)
    groups.update({key: run.tensors[key] for key in ("kept", "kept_ema") if key in run.tensors})
    state.save(run.folder / run_folder.LAST, run.position, groups, run.precision.device)


def _tell(run: Run, row: loop.Epoch) -> None:
    mark = "  best" if best.rank(row) == run.position.best else ""
    run.say(
        f"{row.stage:>8} {row.epoch:>3}  lr {row.lr:.2e}  train {row.train_loss:.4f}  "
        f"valid {row.valid_loss:.4f}  accuracy {row.accuracy:.2%}  {row.seconds:.1f} s{mark}"
    )
