"""Start a new fine-tuning run, or resume one. Options and data are checked before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from serving.errors import DataError, OptionError
from serving.terminal import quote_path
from training.activations.stage_loaders import StageLoaders
from training.config.schema import Recipe
from training.data.dataset import SPLIT_FILE, Dataset, load_dataset, read_split
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine import auto_batch_size, compile, plan
from training.engine.stages import Run, train
from training.evaluation.metrics import Labels
from training.evaluation.shortcomings import unmeasured
from training.models.classifier import Classifier
from training.pixels.decoded import DecodedPhotos
from training.report import report
from training.run import checkpoint, resume_state
from training.run.folder import (
    LAST_FOLDER,
    RECIPE_FILE,
    RUN_FILE,
    RunInfo,
    check_out,
    create_run_folder,
    read_run,
    remove_leftovers,
    start_run,
)
from training.run.resume_state import STATE_FILE, Position, ResumeTensors
from training.utils import archive, disk_cache
from training.utils.console import Log, log_to_stderr, pluralize
from training.utils.precision import Precision, choose_precision
from training.utils.timer import Timer

UNPRETRAINED: Final = (
    "no pretrained weights: every stage trains the whole network at one learning rate"
)
"""Log line for a run without pretrained weights whose recipe has stages with frozen layers."""


def run(
    recipe: Recipe,
    source: str,
    *,
    split: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    cache_gb: float | None = None,
    log: Log = log_to_stderr,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Fine-tune a network on the photos of `source`, with the options of a recipe.

    Args:
        recipe: The recipe.
        source: Value of `--data`: a folder of photos or the name of a dataset.
        split: Value of `--split`: a CSV file that assigns each photo to a fold. None: no such file.
        out: The run folder, new or empty. None: runs/NAME, or runs/NAME-2 and so on, where NAME is
            the name of the recipe.
        device: "auto", "cpu" or "cuda".
        cache_gb: Size limit of the disk cache in GB; None: see `disk_cache.budget_gb`.
        log: Function that is called with each log line.
        process_group: The processes that train. All must have the same recipe and the same photos.

    Returns:
        The run folder.

    Raises:
        FledgeError: An option or the data is wrong, or the loss diverged. Wrong options and data
            are reported before the run folder is written.
    """
    timer = Timer()
    log = process_group.on_main_process(log)
    if process_group.is_main_process:
        check_out(out)
    precision = _precision(recipe, device, process_group)
    with process_group.local_main_process_first():  # may download the dataset
        dataset = load_dataset(source, split=split, config=recipe.data, seed=recipe.seed)
    for line in dataset.reading.lines():
        log(line)
    process_group.check_same({"the split of the photos": dataset.fingerprint})
    classifier, pretrained = _classifier(recipe, len(dataset.classes), log, process_group)
    stages = plan.stages_of(recipe, pretrained)
    plan.check(classifier, recipe, stages)
    for line in plan.fallbacks(classifier, stages):
        log(line)
    photos = DecodedPhotos(dataset, recipe.data.presize, log, cache_gb)
    with timer("decoding"), process_group.local_main_process_first():
        photos.pixel_sets(recipe.preprocess_of(stages[0]))
    dataset = photos.dataset
    process_group.check_same({"what can be read of the photos": dataset.fingerprint})
    for line in unmeasured(dataset.classes, _validation_photos(dataset)):
        log(f"warning: {line}")
    if dataset.unlabelled:
        log(f"{len(dataset.unlabelled)} unlabelled photos: score them with fledge score")
    if not pretrained and stages != plan.stages_of(recipe, True):
        log(UNPRETRAINED)
    recipe = auto_batch_size.resolve_batch_size(
        recipe, classifier, stages, dataset, precision, log, process_group
    )
    folder = process_group.broadcast_object(lambda: create_run_folder(out, recipe.name))
    run_info = RunInfo(
        source=dataset.source,
        root=str(dataset.root),
        fingerprint=dataset.fingerprint,
        classes=dataset.classes,
        pretrained=pretrained,
        device=device,
        versions=checkpoint.versions(),
    )
    if process_group.is_main_process:
        start_run(folder, recipe, dataset, run_info)
    info = plan.info(recipe, dataset)
    activations = StageLoaders(
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
    log: Log = log_to_stderr,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Resume a killed or interrupted run after the last epoch that was finished.

    The final weights are bit-identical to those of an uninterrupted run if the machine and the
    numbers of threads and processes are the same.

    Args:
        folder: The run folder; only the main process reads it.
        device: "auto", "cpu" or "cuda". None: the value that the run was started with.
        root: Folder or archive of the photos. None: the folder that the run was started with.
        cache_gb: Size limit of the disk cache in GB; None: see `disk_cache.budget_gb`.
        log: Function that is called with each log line.
        process_group: The processes that train.

    Returns:
        The run folder.

    Raises:
        FledgeError: No run was started in `folder`, files of the run can't be read, the photos have
            changed since the run was started, an option is wrong, or the loss diverged.
    """
    timer = Timer()
    log = process_group.on_main_process(log)
    state_file = f"{LAST_FOLDER}/{STATE_FILE}"
    names = (RUN_FILE, RECIPE_FILE, SPLIT_FILE, state_file)
    with process_group.broadcast_files(folder, names) as files:
        recipe, run_info = read_run(files)
        if process_group.broadcast_object(lambda: not (folder / LAST_FOLDER).exists()):
            if not process_group.broadcast_object(lambda: (folder / report.REPORT).exists()):
                raise DataError(
                    f"--resume {folder}: its folder {LAST_FOLDER}/ is missing, and the run is not "
                    "finished; start a new run"
                )
            if process_group.is_main_process:
                remove_leftovers(folder)
            command = f"fledge export {quote_path(folder)} --out bundle"
            log(f"{folder} is finished already; next: {command}")
            return folder
        precision = _precision(recipe, device or run_info.device, process_group)
        with process_group.local_main_process_first():  # may extract an archive
            photos_folder = _photos_folder(root, run_info)
        dataset = read_split(files / SPLIT_FILE, photos_folder, run_info.classes, run_info.source)
        # With a resume state the initial weights are not needed.
        weights = {"auto": "imagenet" if run_info.pretrained else "none"}.get(
            recipe.weights, recipe.weights
        )
        has_state = (files / state_file).exists()
        built = recipe.model_copy(update={"weights": "none" if has_state else weights})
        classifier, _ = _classifier(built, len(run_info.classes), log, process_group)
        state = resume_state.load(files / LAST_FOLDER, precision.device, process_group.rank)
    stages = plan.stages_of(recipe, run_info.pretrained)
    position, tensors = state or (Position(), ResumeTensors())
    photos = DecodedPhotos(dataset, recipe.data.presize, log, cache_gb)
    with timer("decoding"), process_group.local_main_process_first():
        photos.pixel_sets(recipe.preprocess_of(stages[min(position.stage, len(stages) - 1)]))
    if photos.dataset.fingerprint != run_info.fingerprint:
        raise DataError(
            f"--resume {folder}: the photos in {photos_folder} have changed since the run was "
            "started; restore them, or start a new run"
        )
    if state:
        classifier.load_state_dict(tensors.model)
        tensors.model = {}  # frees the memory
        log(f"{folder}: resuming after {pluralize(len(position.history), 'finished epoch')}")
        if position.processes != process_group.size:
            log(
                f"warning: the run was started with {position.processes} processes and continues "
                f"with {process_group.size}: the weights will not be bit-equal"
            )
    activations = StageLoaders(
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


def _photos_folder(root: Path | None, run_info: RunInfo) -> Path:
    """Return the folder of a resumed run's photos; see `resume`."""
    if root is None:
        return archive.found_again(Path(run_info.root), run_info.source).resolve()
    return (archive.extracted(root) if archive.is_archive(root) else root).resolve()


def _validation_photos(dataset: Dataset) -> Labels:
    """Return the number of validation photos of each class, int64 [C]."""
    labels = [label for _, label in dataset.valid]
    return np.bincount(labels, minlength=len(dataset.classes))


def _precision(recipe: Recipe, device: str, process_group: ProcessGroup) -> Precision:
    """Choose the device and dtype of this process, and check that the processes fit together.

    Raises:
        DataError: The processes differ in recipe, software versions or kind of device.
        OptionError: The batch has fewer than 2 photos per process, `device` is not available, or
            the recipe's `compile` option does not work here.
    """
    if 0 < recipe.batch_size < 2 * process_group.size:  # 0 is "auto"
        raise OptionError(
            f"batch_size = {recipe.batch_size}: it is split among {process_group.size} processes, "
            f"with at least 2 photos each: use {2 * process_group.size} or more, or fewer processes"
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
    """Create the network with the same initial weights in all processes.

    Returns:
        The network, and whether its body has pretrained weights.
    """
    own = recipe if process_group.is_main_process else recipe.model_copy(update={"weights": "none"})
    classifier, pretrained = plan.build_classifier(own, classes, log)
    pretrained = process_group.broadcast_object(lambda: pretrained)
    process_group.broadcast_module(classifier)
    process_group.seed(recipe.seed)
    return classifier, pretrained
