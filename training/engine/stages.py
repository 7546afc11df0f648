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
from training.activations.cache import Activations
from training.activations.loaders import TrainFeed, ValidFeed
from training.activations.sharing import Share, shares
from training.config.schema import Recipe, Stage
from training.distributed import torchrun
from training.distributed.process_group import ALONE, Team
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
from training.run.metric_log import Journal, read_steps
from training.run.resume_state import Position
from training.utils.console import Say
from training.utils.console import say as say_aloud
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
    activations: Activations
    folder: Path
    info: checkpoint.CheckpointInfo
    say: Say
    position: Position = field(default_factory=Position)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    team: Team = ALONE
    saved: int = 0

    @property
    def precision(self) -> Precision:
        """What it computes in, and where."""
        return self.activations.precision


def go(run: Run) -> Path:
    """Train what is left of a run, score its best checkpoint, write its report; its folder.

    Of several processes all train, and the one that leads does the rest.

    Raises:
        WorkError: A loss that is no number, a full disk; the run can be resumed.
    """
    recipe, position, clock = run.recipe, run.position, run.activations.clock
    dataset = run.activations.photos.dataset
    run.say(
        f"{len(dataset.classes)} classes, {len(dataset.train)} photos to train on, "
        f"{len(dataset.valid)} to validate; {recipe.arch} at {recipe.preprocess.size} px on "
        f"{run.precision.device.type}, {str(run.precision.dtype).removeprefix('torch.')}"
        + (f", {run.team.size} processes" if run.team.size > 1 else "")
    )
    position.processes, run.saved = run.team.size, len(position.history)
    run.classifier.to(run.precision.device).to(memory_format=torch.channels_last)
    journal = Journal(run.folder, position.history) if run.team.leads else None
    ema = Ema(run.classifier, recipe.optimizer.ema) if recipe.optimizer.ema else None
    if ema and "ema" in run.tensors:
        ema.load(run.tensors["ema"])
    try:
        shared = shares(run.classifier, recipe, run.stages)
        while position.stage < len(run.stages):
            _stage(run, shared[position.stage], journal, ema)
        run.team.leave()
        if not run.team.leads:
            return run.folder
        with clock("scoring the best"):
            result = best_checkpoint.finish(run.folder, dataset, recipe.tta, run.say)
        with clock("report"):
            report.write(run.folder, say=run.say, tta=recipe.tta, result=result)
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
    seconds = clock.read()
    run.say("seconds: " + ", ".join(f"{what} {spent:.1f}" for what, spent in seconds.items()))
    run.say(
        f"{run.folder}: validation accuracy {accuracy:.2%} (loss {loss:.4f}){views} in float32 "
        f"after {sum(seconds.values()):.0f} s; look at {run.folder / report.REPORT}; "
        f"next: fledge export {run.folder} --out bundle"
    )
    return run.folder


def _tell_how_to_go_on(run: Run, error: BaseException) -> None:
    if not run.team.first_to_fail():
        return
    why = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
    say = run.say if run.team.leads else say_aloud
    way = "" if run.team.size == 1 else "torchrun … -m "
    kept = "1 finished epoch is" if run.saved == 1 else f"{run.saved} finished epochs are"
    if isinstance(error, Diverged):
        say(f"{why}: {kept} kept in {run.folder}; start anew with a lower rate")
    else:
        say(f"{why}: {kept} kept; go on with: {way}fledge train --resume {run.folder}")


def _feeds(run: Run, share: Share, ema: Ema | None) -> tuple[TrainFeed, ValidFeed]:
    """The batches of the stage in progress, of the same views in all processes."""
    position, team = run.position, run.team

    def feeds(views: int | None) -> tuple[TrainFeed, ValidFeed]:
        stage = run.stages[position.stage]
        with team.in_turn():  # the first of a machine decodes for all there
            return run.activations.feeds(
                run.classifier, stage, share, position.first_view, views, ema
            )

    feed, held_out = feeds(position.views)
    position.views = views = team.decide(lambda: feed.views)
    if team.any(feed.views != views):  # process 0 has more room for them, or less
        feed, held_out = feeds(views)
    feed.team = held_out.team = team
    return feed, held_out


def _stage(run: Run, share: Share, journal: Journal | None, ema: Ema | None) -> None:
    """Train one stage, from wherever it stands, and step on to the next."""
    recipe, classifier, position = run.recipe, run.classifier, run.position
    clock = run.activations.clock
    stage = run.stages[position.stage]
    feed, held_out = _feeds(run, share, ema)
    if run.team.size > 1 and run.precision.device.type == "cuda":
        torchrun.sync_batchnorms(classifier)
    lr = stage.lr if stage.lr != "find" else position.lr
    if lr is None:
        with clock("lr_find"):
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
            with clock("validation"):
                accuracy, valid_loss = loop.validate(classifier, held_out, run.precision, run.team)
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
                with clock("saving"):
                    if run.team.leads:
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
    if run.team.leads:
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
    if run.team.leads:
        with clock("report"):
            picture = run.folder / "schedule.png"
            lr_plots.schedule(
                lr_plots.rows(read_steps(run.folder)), picture, f"{recipe.name}: as run"
            )
    _save(run, ema, None)


def _find_lr(run: Run, stage: Stage, feed: TrainFeed) -> float:
    curve = loop.find_lr(run.classifier, stage, run.recipe, feed)
    pick = run.recipe.lr_find.pick
    picked = run.team.decide(lambda: curve.pick(pick))
    if run.team.leads:
        path = run.folder / f"lr_find-{stage.name}.png"
        lr_plots.lr_find(curve, path, f"lr_find before {stage.name}", pick)
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
    with run.activations.clock("saving"):
        own = state.random_state(run.precision.device, run.team.rank)
        groups[state.RANDOM] = run.team.gather(own)
        if run.team.leads:
            state.save(run.folder / run_folder.LAST, run.position, groups)
        run.saved = len(run.position.history)


def _tell(run: Run, row: Epoch) -> None:
    mark = "  best" if best_checkpoint.rank(row) == run.position.best else ""
    run.say(
        f"{row.stage:>8} {row.epoch:>3}  lr {row.lr:.2e}  train {row.train_loss:.4f}  "
        f"valid {row.valid_loss:.4f}  accuracy {row.accuracy:.2%}  {row.seconds:.1f} s{mark}"
    )
