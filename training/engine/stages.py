"""A fine-tune in progress: stage after stage, epoch after epoch, readable top to bottom."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from serving.errors import Diverged, WorkError
from training.activations.cache import ActivationCache
from training.activations.loaders import TrainLoader, ValidLoader
from training.activations.sharing import SharedPrefix, shares
from training.config.schema import Recipe, Stage
from training.distributed import torchrun
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine import best_checkpoint, plan
from training.engine import epoch as loop
from training.evaluation import evaluate
from training.models import classifier as model
from training.optim import optimizer as optim
from training.optim.ema import Ema
from training.report import lr_plots, report
from training.run import checkpoint
from training.run import folder as run_folder
from training.run import resume_state as state
from training.run.history import Epoch
from training.run.metric_log import MetricLog, read_steps
from training.run.resume_state import Position
from training.utils.console import Log
from training.utils.console import log_to_stderr as say_aloud
from training.utils.precision import Precision


@dataclass
class Run:
    """What every stage works with; `go` does the work.

    team: the processes that do it together; `say` is heard in the one that leads. saved: epochs
    that a resumed run would find done.
    """

    recipe: Recipe
    stages: list[Stage]
    classifier: model.Classifier
    activations: ActivationCache
    folder: Path
    info: checkpoint.CheckpointInfo
    log: Log
    position: Position = field(default_factory=Position)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    process_group: ProcessGroup = SINGLE_PROCESS
    saved: int = 0

    @property
    def precision(self) -> Precision:
        """What it computes in, and where."""
        return self.activations.precision


def train(run: Run) -> Path:
    """Train what is left of a run, score its best checkpoint, write its report; its folder.

    Of several processes all train, and the one that leads does the rest.

    Raises:
        WorkError: A loss that is no number, a full disk; the run can be resumed.
    """
    recipe, position, timer = run.recipe, run.position, run.activations.timer
    dataset = run.activations.photos.dataset
    run.log(
        f"{len(dataset.classes)} classes, {len(dataset.train)} photos to train on, "
        f"{len(dataset.valid)} to validate; {recipe.arch} at {recipe.preprocess.size} px on "
        f"{run.precision.device.type}, {str(run.precision.dtype).removeprefix('torch.')}"
        + (f", {run.process_group.size} processes" if run.process_group.size > 1 else "")
    )
    position.processes, run.saved = run.process_group.size, len(position.history)
    run.classifier.to(run.precision.device).to(memory_format=torch.channels_last)
    journal = MetricLog(run.folder, position.history) if run.process_group.is_main_process else None
    ema = Ema(run.classifier, recipe.optimizer.ema) if recipe.optimizer.ema else None
    if ema and "ema" in run.tensors:
        ema.load(run.tensors["ema"])
    try:
        shared = shares(run.classifier, recipe, run.stages)
        while position.stage < len(run.stages):
            _stage(run, shared[position.stage], journal, ema)
        run.process_group.leave()
        if not run.process_group.is_main_process:
            return run.folder
        with timer("scoring the best"):
            result = best_checkpoint.finish(run.folder, dataset, recipe.tta, run.log)
        with timer("report"):
            report.write(run.folder, log=run.log, tta=recipe.tta, result=result)
    except (KeyboardInterrupt, OSError, WorkError) as error:
        _tell_how_to_go_on(run, error)
        raise
    except RuntimeError as error:
        if torchrun.lost(error):
            _tell_how_to_go_on(run, error)
        raise
    run_folder.close(run.folder)
    run_folder.point_latest(run.folder)
    accuracy, loss = evaluate.score(result.plain, result.labels)
    views = f", {result.accuracy:.2%} over {result.views} views" if result.views > 1 else ""
    seconds = timer.read()
    run.log("seconds: " + ", ".join(f"{what} {spent:.1f}" for what, spent in seconds.items()))
    run.log(
        f"{run.folder}: validation accuracy {accuracy:.2%} (loss {loss:.4f}){views} in float32 "
        f"after {sum(seconds.values()):.0f} s; look at {run.folder / report.REPORT}; "
        f"next: fledge export {run.folder} --out bundle"
    )
    return run.folder


def _tell_how_to_go_on(run: Run, error: BaseException) -> None:
    if not run.process_group.first_to_fail():
        return
    why = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
    log = run.log if run.process_group.is_main_process else say_aloud
    way = "" if run.process_group.size == 1 else "torchrun … -m "
    kept = "1 finished epoch is" if run.saved == 1 else f"{run.saved} finished epochs are"
    if isinstance(error, Diverged):
        log(f"{why}: {kept} kept in {run.folder}; start anew with a lower rate")
    else:
        log(f"{why}: {kept} kept; go on with: {way}fledge train --resume {run.folder}")


def _feeds(run: Run, share: SharedPrefix, ema: Ema | None) -> tuple[TrainLoader, ValidLoader]:
    """The batches of the stage in progress, of the same views in all processes."""
    position, process_group = run.position, run.process_group

    def feeds(views: int | None) -> tuple[TrainLoader, ValidLoader]:
        stage = run.stages[position.stage]
        with (
            process_group.local_main_process_first()
        ):  # the first of a machine decodes for all there
            return run.activations.feeds(
                run.classifier, stage, share, position.first_view, views, ema
            )

    feed, held_out = feeds(position.views)
    position.views = views = process_group.decide(lambda: feed.views)
    if process_group.any(feed.views != views):  # process 0 has more room for them, or less
        feed, held_out = feeds(views)
    feed.process_group = held_out.process_group = process_group
    return feed, held_out


def _stage(run: Run, share: SharedPrefix, journal: MetricLog | None, ema: Ema | None) -> None:
    """Train one stage, from wherever it stands, and step on to the next."""
    recipe, classifier, position = run.recipe, run.classifier, run.position
    timer = run.activations.timer
    stage = run.stages[position.stage]
    classifier.freeze_for(stage)
    feed, held_out = _feeds(run, share, ema)
    if run.process_group.size > 1 and run.precision.device.type == "cuda":
        torchrun.sync_batchnorms(classifier)
    lr = stage.lr if stage.lr != "find" else position.lr
    if lr is None:
        with timer("lr_find"):
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
            with timer("validation"):
                accuracy, valid_loss = loop.validate(
                    classifier, held_out, run.precision, run.process_group
                )
            if not math.isfinite(valid_loss):
                raise Diverged(
                    f"stage {stage.name}: the validation loss is {valid_loss} after epoch "
                    f"{position.epoch + 1}, rate {steps[-1].lr[-1]:.3g}; "
                    f"lower stage.{stage.name}.lr"
                )
            position.epoch += 1
            row = Epoch(
                stage.name, position.epoch, steps[-1].lr[-1], train_loss, valid_loss, accuracy,
                time.perf_counter() - started,
            )  # fmt: skip
            if best_checkpoint.rank(row) > position.best:
                position.best = best_checkpoint.rank(row)
                preprocess = recipe.preprocess_of(stage)
                with timer("saving"):
                    if run.process_group.is_main_process:
                        best_checkpoint.save(run.folder, row, classifier, run.info, preprocess)
        position.history.append(row)
        if journal:
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
    if run.process_group.is_main_process:
        with averaged():
            info = replace(
                run.info, preprocess=recipe.preprocess_of(stage), metrics={"stage": stage.name}
            )
            path = run.folder / run_folder.STAGES / f"{stage.name}.safetensors"
            checkpoint.save(path, classifier, info)
    if share.last:
        position.first_view += position.views or stage.epochs
        position.views = None
    position.stage, position.epoch, position.lr = position.stage + 1, 0, None
    if run.process_group.is_main_process:
        with timer("report"):
            picture = run.folder / "schedule.png"
            lr_plots.schedule(
                lr_plots.rows(read_steps(run.folder)), picture, f"{recipe.name}: as run"
            )
    _save(run, ema, None)


def _find_lr(run: Run, stage: Stage, feed: TrainLoader) -> float:
    curve = loop.find_lr(run.classifier, stage, run.recipe, feed)
    pick = run.recipe.lr_find.pick
    picked = run.process_group.decide(lambda: curve.pick(pick))
    if run.process_group.is_main_process:
        path = run.folder / f"lr_find-{stage.name}.png"
        lr_plots.lr_find(curve, path, f"lr_find before {stage.name}", pick)
    run.log(
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
    with run.activations.timer("saving"):
        own = state.random_state(run.precision.device, run.process_group.rank)
        groups[state.RANDOM] = run.process_group.gather(own)
        if run.process_group.is_main_process:
            state.save(run.folder / run_folder.LAST, run.position, groups)
        run.saved = len(run.position.history)


def _tell(run: Run, row: Epoch) -> None:
    mark = "  best" if best_checkpoint.rank(row) == run.position.best else ""
    run.log(
        f"{row.stage:>8} {row.epoch:>3}  lr {row.lr:.2e}  train {row.train_loss:.4f}  "
        f"valid {row.valid_loss:.4f}  accuracy {row.accuracy:.2%}  {row.seconds:.1f} s{mark}"
    )
