"""From a recipe and photos to a run: all that can be wrong is found before the work begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serving.errors import DataError, OptionError
from training.activations.cache import ActivationCache
from training.config.schema import Recipe
from training.data.dataset import SPLIT_FILE, load_dataset, read_split
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine import auto_batch_size, compile, plan
from training.engine.stages import Run, train
from training.models.classifier import Classifier
from training.pixels import decoded
from training.report import report
from training.run import checkpoint
from training.run import folder as run_folder
from training.run import resume_state as state
from training.run.resume_state import Position
from training.utils import disk_cache
from training.utils.console import Log
from training.utils.console import log_to_stderr as say_aloud
from training.utils.precision import Precision, choose_precision
from training.utils.timer import Timer


def run(
    recipe: Recipe,
    source: str,
    *,
    split: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    cache_gb: float | None = None,
    log: Log = say_aloud,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Fine-tune by `recipe` on the photos of `source`; returns the run's folder.

    Args:
        recipe: What to do.
        source: As `load_dataset`.
        split: As `load_dataset`.
        out: The run's folder, new or empty; `runs/NAME` with a number where that is taken.
        device: "auto", "cpu" or "cuda".
        cache_gb: Budget of what is kept between runs, in GB; as `cache.wanted`.
        say: Takes lines for a person.
        team: The processes that do it together, all by the same recipe on the same photos.

    Raises:
        FledgeError: Anything wrong with the request, before anything is written; a NaN loss.
    """
    timer = Timer()
    log = process_group.on_main_process(log)
    if process_group.is_main_process:
        run_folder.check_free(out)
    precision = _precision(recipe, device, process_group)
    with process_group.local_main_process_first():  # the first one may have to fetch them
        dataset = load_dataset(source, split=split, config=recipe.data, seed=recipe.seed)
    process_group.check_same({"the split of the photos": dataset.fingerprint})
    classifier, pretrained = _classifier(recipe, len(dataset.classes), log, process_group)
    stages = plan.stages_of(recipe, pretrained)
    plan.check(classifier, recipe, stages)
    photos = decoded.Photos(dataset, recipe.data.presize, log, cache_gb)
    with timer("decoding"), process_group.local_main_process_first():
        photos.at(recipe.preprocess_of(stages[0]))
    dataset = photos.dataset
    process_group.check_same({"what can be read of the photos": dataset.fingerprint})
    if dataset.unlabelled:
        log(f"{len(dataset.unlabelled)} unlabelled photos: score them with fledge score")
    if not pretrained and stages != plan.stages_of(recipe, True):
        log("no trained weights: every stage trains the whole network, at one rate")
    recipe = auto_batch_size.settle(
        recipe, classifier, stages, dataset, precision, log, process_group
    )
    folder = process_group.broadcast_object(lambda: run_folder.claim(out, recipe.name))
    begun = run_folder.Begun(
        source=dataset.source,
        root=str(dataset.root),
        fingerprint=dataset.fingerprint,
        classes=dataset.classes,
        pretrained=pretrained,
        device=device,
        versions=checkpoint.versions(),
    )
    if process_group.is_main_process:
        run_folder.begin(folder, recipe, dataset, begun)
    info = plan.info(recipe, dataset)
    activations = ActivationCache(
        photos, recipe, precision, disk_cache.open_cache(cache_gb), log, timer
    )
    return train(
        Run(recipe, stages, classifier, activations, folder, info, log, process_group=process_group)
    )


def resume(
    folder: Path,
    *,
    device: str | None = None,
    root: Path | None = None,
    cache_gb: float | None = None,
    log: Log = say_aloud,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Go on with a run that was killed or interrupted, from its last finished epoch.

    On the same machine with as many threads and processes it ends with the same weights, bit for
    bit, as a run that was never interrupted.

    Args:
        folder: The run's folder; only the process that leads reads it.
        device: Another one than the run began with.
        root: Where the photos are now, if they have moved.
        cache_gb, say, team: As `run`.

    Raises:
        DataError: No run there that got going, or its photos are no longer what they were.
    """
    timer = Timer()
    log = process_group.on_main_process(log)
    state_file = f"{run_folder.LAST}/{state.STATE}"
    names = (run_folder.RUN, run_folder.RECIPE, SPLIT_FILE, state_file)
    with process_group.broadcast_files(folder, names) as kept:
        recipe, begun = run_folder.read(kept)
        if process_group.broadcast_object(lambda: not (folder / run_folder.LAST).exists()):
            if not process_group.broadcast_object(lambda: (folder / report.REPORT).exists()):
                raise DataError(
                    f"--resume {folder}: its folder {run_folder.LAST}/ is gone, and the run had "
                    "not ended; start anew"
                )
            log(f"{folder} is finished already; next: fledge export {folder} --out bundle")
            return folder
        precision = _precision(recipe, device or begun.device, process_group)
        where = (root or Path(begun.root)).resolve()
        dataset = read_split(kept / SPLIT_FILE, where, begun.classes, begun.source)
        begin_again = not (kept / state_file).exists()
        weights = {"auto": "imagenet" if begun.pretrained else "none"}.get(
            recipe.weights, recipe.weights
        )
        built = recipe.model_copy(update={"weights": weights if begin_again else "none"})
        classifier, _ = _classifier(built, len(begun.classes), log, process_group)
        found = state.load(kept / run_folder.LAST, precision.device, process_group.rank)
    stages = plan.stages_of(recipe, begun.pretrained)
    position, tensors = found or (Position(), {})
    photos = decoded.Photos(dataset, recipe.data.presize, log, cache_gb)
    with timer("decoding"), process_group.local_main_process_first():
        photos.at(recipe.preprocess_of(stages[min(position.stage, len(stages) - 1)]))
    if photos.dataset.fingerprint != begun.fingerprint:
        raise DataError(
            f"--resume {folder}: the photos in {where} are no longer those that the run began "
            "with; put them back, or start anew"
        )
    if found:
        classifier.load_state_dict(tensors.pop("model"))
        log(f"{folder}: going on after {len(position.history)} finished epochs")
        if position.processes != process_group.size:
            log(
                f"warning: it was begun by {position.processes} processes and goes on by "
                f"{process_group.size}: not to the same bits"
            )
    activations = ActivationCache(
        photos, recipe, precision, disk_cache.open_cache(cache_gb), log, timer
    )
    info = plan.info(recipe, dataset)
    return train(
        Run(
            recipe,
            stages,
            classifier,
            activations,
            folder,
            info,
            log,
            position,
            tensors,
            process_group,
        )
    )


def _precision(recipe: Recipe, device: str, process_group: ProcessGroup) -> Precision:
    """What the processes compute in, each where it is, once it is sure that they can do it.

    Raises:
        DataError: They have not all begun the same.
        OptionError: As `choose_precision`; a batch that is too small to be shared out.
    """
    if 0 < recipe.batch_size < 2 * process_group.size:  # 0 is still to be found
        raise OptionError(
            f"batch_size = {recipe.batch_size}: it is shared out among {process_group.size} processes, 2 "
            f"photos or more to each: use {2 * process_group.size} or more, or fewer processes"
        )
    precision = choose_precision(device, recipe.precision, process_group.gpu)
    compile.check(recipe, precision.device, process_group.size)
    process_group.check_same(
        {
            "the recipe": recipe.model_dump_json(),
            "the version of Python, torch or torchvision": str(checkpoint.versions()),
            "the kind of device": precision.device.type,
        }
    )
    return replace(precision, dtype=process_group.broadcast_object(lambda: precision.dtype))


def _classifier(
    recipe: Recipe, classes: int, log: Log, process_group: ProcessGroup
) -> tuple[Classifier, bool]:
    """As `plan.build_classifier`; the weights are those that the process that leads has."""
    own = recipe if process_group.is_main_process else recipe.model_copy(update={"weights": "none"})
    classifier, pretrained = plan.build_classifier(own, classes, log)
    pretrained = process_group.broadcast_object(lambda: pretrained)
    process_group.broadcast_module(classifier)
    process_group.seed(recipe.seed)
    return classifier, pretrained
