"""Training loop of a run: train the epochs of all stages, then evaluate and write the report."""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from serving.errors import Diverged, WorkError
from serving.terminal import quote_path
from training.activations.loaders import TrainLoader, ValidLoader
from training.activations.sharing import SharedPrefix, plan_sharing
from training.activations.stage_loaders import StageLoaders
from training.config.schema import Recipe, Stage
from training.distributed import torchrun
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine import best_checkpoint, epoch
from training.engine.early_stopping import EarlyStopping
from training.evaluation import evaluate, shortcomings
from training.models.classifier import Classifier
from training.optim.ema import Ema
from training.optim.optimizer import build_optimizer
from training.report import lr_plots, report
from training.run import checkpoint, resume_state
from training.run.folder import LAST_FOLDER, STAGES_FOLDER, finish_run, update_latest_link
from training.run.history import Epoch, Step
from training.run.metric_log import MetricLog, read_steps
from training.run.resume_state import Position, ResumeTensors
from training.utils.console import Log, log_to_stderr
from training.utils.precision import Precision


@dataclass
class Run:
    """Everything that `train` needs for a new or resumed run.

    Attributes:
        recipe: The recipe, with a number for `batch_size`.
        stages: The stages, as `plan.stages_of` returns them.
        classifier: The network.
        activations: Factory of the data loaders.
        folder: The run folder.
        info: Description of the run's checkpoints, without metrics.
        log: Function that is called with each log line; in processes other than the main process it
            discards the line.
        position: Progress of the run.
        resumed: Tensors of the resume state that the run starts from; empty for a new run.
        process_group: The processes that train.
        saved: Number of finished epochs in the resume state on disk.
    """

    recipe: Recipe
    stages: list[Stage]
    classifier: Classifier
    activations: StageLoaders
    folder: Path
    info: checkpoint.CheckpointInfo
    log: Log
    position: Position = field(default_factory=Position)
    resumed: ResumeTensors = field(default_factory=ResumeTensors)
    process_group: ProcessGroup = SINGLE_PROCESS
    saved: int = 0

    @property
    def precision(self) -> Precision:
        """Device and dtype of the training."""
        return self.activations.precision


def train(run: Run) -> Path:
    """Train the remaining epochs, evaluate the best checkpoint, and write the report.

    All processes train; only the main process evaluates and writes the report.

    Returns:
        The run folder.

    Raises:
        WorkError: The loss diverged, or the disk is full. After a full disk the run can be resumed.
    """
    position, timer = run.position, run.activations.timer
    _log_start(run)
    position.processes, run.saved = run.process_group.size, len(position.history)
    run.classifier.to(run.precision.device).to(memory_format=torch.channels_last)
    ema = Ema(run.classifier, run.recipe.optimizer.ema) if run.recipe.optimizer.ema else None
    if ema and run.resumed.ema:
        ema.load(run.resumed.ema)
    try:
        shared = plan_sharing(run.classifier, run.recipe, run.stages)
        with _open_metric_log(run) as metric_log:
            while position.stage < len(run.stages):
                _train_stage(run, shared[position.stage], metric_log, ema)
        run.process_group.destroy()
        if not run.process_group.is_main_process:
            return run.folder
        dataset, tta = run.activations.photos.dataset, run.recipe.tta
        with timer("evaluation"):
            result = best_checkpoint.evaluate_best(run.folder, dataset, tta, run.log)
        with timer("report"):
            report.write(run.folder, log=run.log, tta=tta, result=result)
    except (KeyboardInterrupt, OSError, WorkError) as error:
        _log_how_to_resume(run, error)
        raise
    except RuntimeError as error:
        if torchrun.is_connection_error(error):
            _log_how_to_resume(run, error)
        raise
    try:
        update_latest_link(run.folder)
    except OSError as error:  # a convenience, and not every file system has links
        run.log(f"warning: {run.folder.parent / 'latest'} can't be set: {error.strerror or error}")
    finish_run(run.folder)
    _log_result(run, result)
    return run.folder


def _open_metric_log(run: Run) -> AbstractContextManager[MetricLog | None]:
    if not run.process_group.is_main_process:
        return nullcontext()
    return MetricLog(run.folder, run.position.history)


def _train_stage(
    run: Run, share: SharedPrefix, metric_log: MetricLog | None, ema: Ema | None
) -> None:
    """Train the remaining epochs of the current stage, then set the position to the next stage."""
    classifier, position = run.classifier, run.position
    stage = run.stages[position.stage]
    classifier.freeze_for(stage)
    train_loader, valid_loader = _open_loaders(run, stage, share, ema)
    if run.process_group.size > 1 and run.precision.device.type == "cuda":
        torchrun.sync_batchnorms(classifier)
    lr = stage.lr if stage.lr != "find" else position.lr
    if lr is None:
        lr = position.lr = _find_lr(run, stage, train_loader)
    optimizer = build_optimizer(classifier, run.recipe.optimizer, stage, lr)
    if run.resumed.optimizer:
        resume_state.load_optimizer_state(optimizer, run.resumed.optimizer)
    early_stopping = EarlyStopping(stage.patience, classifier, ema, run.resumed)
    run.resumed = ResumeTensors()  # frees the memory; used by the first stage only
    losses = position.losses(stage.name)
    while position.epoch < stage.epochs and not early_stopping.should_stop(losses):
        row, steps = _run_epoch(run, stage, optimizer, train_loader, valid_loader, ema)
        position.epoch += 1
        position.history.append(row)
        losses.append(row.valid_loss)
        if metric_log:
            metric_log.add(row, steps)
        _log_epoch(run, row)
        early_stopping.update(losses)
        _save_state(run, ema, optimizer, early_stopping)
    early_stopping.restore()
    _finish_stage(run, stage, share, ema)


def _open_loaders(
    run: Run, stage: Stage, share: SharedPrefix, ema: Ema | None
) -> tuple[TrainLoader, ValidLoader]:
    """Return the training and validation loaders of the stage.

    All processes use the same number of cached augmented views per photo, decided by process 0.
    """
    position, process_group = run.position, run.process_group

    def open_loaders(views: int | None) -> tuple[TrainLoader, ValidLoader]:
        # The first process of a machine decodes the photos; the others read them from the cache.
        with process_group.local_main_process_first():
            return run.activations.loaders(
                run.classifier, stage, share, position.first_view, views, ema
            )

    train_loader, valid_loader = open_loaders(position.views)
    position.views = views = process_group.broadcast_object(lambda: train_loader.views)
    # The budget of another machine may allow another number of views than that of process 0.
    if process_group.any_true(train_loader.views != views):
        train_loader, valid_loader = open_loaders(views)
    train_loader.process_group = valid_loader.process_group = process_group
    return train_loader, valid_loader


def _run_epoch(
    run: Run,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    train_loader: TrainLoader,
    valid_loader: ValidLoader,
    ema: Ema | None,
) -> tuple[Epoch, list[Step]]:
    """Train and validate one epoch, and save the best checkpoint if this epoch is the best so far.

    Returns:
        The record of the epoch, and a record of each optimizer step.

    Raises:
        Diverged: The training or validation loss is not finite.
    """
    position, timer, started = run.position, run.activations.timer, time.perf_counter()
    losses = position.losses(stage.name)
    train_loss, steps = epoch.train_epoch(
        run.classifier, stage, run.recipe, optimizer, train_loader, position.epoch, losses, ema
    )
    number, lr = position.epoch + 1, steps[-1].lr[-1]
    with ema.swapped() if ema else nullcontext():
        with timer("validation"):
            accuracy, valid_loss = epoch.validate(
                run.classifier, valid_loader, run.precision, run.process_group
            )
        if not math.isfinite(valid_loss):
            raise Diverged(
                f"stage {stage.name}: the validation loss is {valid_loss} after epoch {number}, "
                f"rate {lr:.3g}; lower stage.{stage.name}.lr"
            )
        seconds = time.perf_counter() - started
        row = Epoch(stage.name, number, lr, train_loss, valid_loss, accuracy, seconds)
        _keep_best(run, stage, row)
    return row, steps


def _keep_best(run: Run, stage: Stage, row: Epoch) -> None:
    """Save the classifier as the best checkpoint if this epoch is the best so far."""
    if best_checkpoint.rank(row) <= run.position.best:
        return
    run.position.best = best_checkpoint.rank(row)
    preprocess = run.recipe.preprocess_of(stage)
    with run.activations.timer("saving"):
        if run.process_group.is_main_process:
            best_checkpoint.save(run.folder, row, run.classifier, run.info, preprocess)


def _finish_stage(run: Run, stage: Stage, share: SharedPrefix, ema: Ema | None) -> None:
    """Save the stage's checkpoint, set the position to the next stage, and plot the schedule."""
    position = run.position
    if run.process_group.is_main_process:
        with ema.swapped() if ema else nullcontext():
            preprocess, metrics = run.recipe.preprocess_of(stage), {"stage": stage.name}
            info = replace(run.info, preprocess=preprocess, metrics=metrics)
            path = run.folder / STAGES_FOLDER / f"{stage.name}.safetensors"
            checkpoint.save(path, run.classifier, info)
    if share.is_last:
        position.first_view += position.views or stage.epochs
        position.views = None
    position.stage, position.epoch, position.lr = position.stage + 1, 0, None
    if run.process_group.is_main_process:
        with run.activations.timer("report"):
            rows = lr_plots.rows(read_steps(run.folder))
            lr_plots.schedule(rows, run.folder / "schedule.png", f"{run.recipe.name}: as run")
    _save_state(run, ema)


def _find_lr(run: Run, stage: Stage, train_loader: TrainLoader) -> float:
    """Run the learning-rate range test of the stage, and plot the loss curve.

    Returns:
        The learning rate that `lr_find.pick` of the recipe selects, the same in all processes.
    """
    with run.activations.timer("lr_find"):
        curve = epoch.find_lr(run.classifier, stage, run.recipe, train_loader)
        pick = run.recipe.lr_find.pick
        lr = run.process_group.broadcast_object(lambda: curve.pick(pick))
        if run.process_group.is_main_process:
            path = run.folder / f"lr_find-{stage.name}.png"
            lr_plots.lr_find(curve, path, f"lr_find before {stage.name}", pick)
    run.log(
        f"{stage.name:>8}  lr_find: {lr:.2e} ({pick}; steepest {curve.steepest:.2e}, "
        f"minimum {curve.minimum:.2e})"
    )
    return lr


def _save_state(
    run: Run,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer | None = None,
    early_stopping: EarlyStopping | None = None,
) -> None:
    """Save the resume state.

    Args:
        run: The run.
        ema: Moving average of the weights, if there is one.
        optimizer: Optimizer of the stage in progress; None after the end of a stage.
        early_stopping: Early stopping of the stage in progress; None after the end of a stage.
    """
    with run.activations.timer("saving"):
        random = resume_state.random_state(run.precision.device, run.process_group.rank)
        tensors = ResumeTensors(
            model=run.classifier.state_dict(),
            ema=ema.state() if ema else {},
            optimizer=resume_state.optimizer_state(optimizer) if optimizer else {},
            kept=early_stopping.kept if early_stopping else {},
            kept_ema=early_stopping.kept_ema if early_stopping else {},
            random=run.process_group.gather(random),
        )
        if run.process_group.is_main_process:
            resume_state.save(run.folder / LAST_FOLDER, run.position, tensors)
        run.saved = len(run.position.history)


def _log_start(run: Run) -> None:
    dataset = run.activations.photos.dataset
    processes = run.process_group.size
    run.log(
        f"{len(dataset.classes)} classes, {len(dataset.train)} training photos, "
        f"{len(dataset.valid)} validation photos; {run.recipe.arch} at "
        f"{run.recipe.preprocess.size} px on {run.precision.device.type}, "
        f"{str(run.precision.dtype).removeprefix('torch.')}"
        + (f", {processes} processes" if processes > 1 else "")
    )


def _log_epoch(run: Run, row: Epoch) -> None:
    mark = "  best" if best_checkpoint.rank(row) == run.position.best else ""
    run.log(
        f"{row.stage:>8} {row.epoch:>3}  lr {row.lr:.2e}  train {row.train_loss:.4f}  "
        f"valid {row.valid_loss:.4f}  accuracy {row.accuracy:.2%}  {row.seconds:.1f} s{mark}"
    )


def _log_result(run: Run, result: evaluate.EvaluationResult) -> None:
    accuracy, loss = evaluate.score(result.plain, result.labels)
    photos, right = shortcomings.count(result.plain, result.labels)
    balanced = shortcomings.balanced_accuracy(photos, right)
    views = f", {result.accuracy:.2%} over {result.views} views" if result.views > 1 else ""
    seconds = run.activations.timer.read()
    run.log("seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()))
    found = list(shortcomings.shortcomings(result.classes, photos, right))
    if found:
        data, last = quote_path(run.activations.photos.dataset.source), run.stages[-1]
        length = "epochs" if last.cycles == 1 else "cycles"
        longer = f"stage.{last.name}.{length}={2 * getattr(last, length)}"
        found.append(shortcomings.REMEDY.format(data=data, longer=longer))
    for line in found:
        run.log(f"warning: {line}")
    run.log(
        f"{run.folder}: validation accuracy {accuracy:.2%}, balanced {balanced:.2%} "
        f"(loss {loss:.4f}){views} in float32 "
        f"after {sum(seconds.values()):.0f} s; report: {run.folder / report.REPORT}; "
        f"next: fledge export {quote_path(run.folder)} --out bundle"
    )


def _launcher(processes: int) -> str:
    """Return what stands before the command where torchrun has started the processes."""
    if processes == 1:
        return ""
    if int(os.environ.get("LOCAL_WORLD_SIZE", processes)) == processes:
        return f"torchrun --standalone --nproc-per-node {processes} -m "
    return "torchrun … -m "  # with the addresses of the machines, as it was started


def _log_how_to_resume(run: Run, error: BaseException) -> None:
    if not run.process_group.should_report_error():
        return
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
    # Any process can be the first that fails, and only the main process's log has an output.
    log = run.log if run.process_group.is_main_process else log_to_stderr
    command = f"{_launcher(run.process_group.size)}fledge train --resume {quote_path(run.folder)}"
    saved = "1 finished epoch is" if run.saved == 1 else f"{run.saved} finished epochs are"
    if isinstance(error, Diverged):
        log(f"{reason}: {saved} saved in {run.folder}; start a new run with a lower learning rate")
    else:
        log(f"{reason}: {saved} saved; resume with: {command}")
