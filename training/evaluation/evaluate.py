"""Evaluate a checkpoint in float32, with the preprocessing code of the service.

With test-time augmentation (TTA), the predictions for several views of a photo (crops, flips or
random augmentations) are averaged. The plain view is the photo as the service sees it without TTA.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from serving.errors import DataError, ImageError
from serving.imaging import decode
from serving.imaging.preprocess import Pixels, Preprocess
from serving.imaging.tta import View, render, softmax
from serving.scoring.row_writers import escape_formula
from serving.utils.files import atomic_write
from serving.utils.parallel import map_ordered
from serving.utils.progress import progress_bar
from training.activations import frozen_prefix
from training.config import load
from training.config.schema import Recipe
from training.config.sections import TtaConfig
from training.data.dataset import Sample, missing_photos_error, photos_changed
from training.evaluation import metrics
from training.evaluation.metrics import Labels, Probabilities
from training.evaluation.tta import combine, draw, fixed_views, random_views
from training.models.classifier import normalise
from training.pixels.transform import PixelTransform
from training.run import checkpoint
from training.run.dataset import load_run_dataset
from training.utils.console import log_to_stderr
from training.utils.device import pad_on_gpu
from training.utils.precision import choose_precision

BATCH = 32
"""Batch size, and number of photos read ahead. With another size results round differently."""


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Predictions for N photos and C classes, and their metrics.

    Attributes:
        accuracy: Accuracy from 0 to 1.
        loss: Mean cross-entropy in nats.
        photos: The number N of photos.
        views: Number of views per photo that were averaged, including the unaugmented view.
        broken: Number of photos that can't be read; they are not counted in `photos`.
        probabilities: Probabilities [N, C], averaged over the views.
        plain: Probabilities [N, C] of the unaugmented view only.
        labels: True classes [N].
        paths: Paths of the N photos.
        classes: Names of the C classes.
        root: The data folder.
    """

    accuracy: float
    loss: float
    photos: int
    views: int
    broken: int = 0
    probabilities: Probabilities = field(default_factory=lambda: np.empty((0, 0)))
    plain: Probabilities = field(default_factory=lambda: np.empty((0, 0)))
    labels: Labels = field(default_factory=lambda: np.empty(0, np.int64))
    paths: tuple[Path, ...] = ()
    classes: tuple[str, ...] = ()
    root: Path = Path()


@torch.inference_mode()
def logits_of(classifier: nn.Module, pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Compute float32 logits [N, classes] of pixels [N, H, W, 3] in 0..255, in eval mode."""
    was_training = classifier.training
    classifier.eval()
    try:
        device = next(classifier.parameters()).device
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            logits = [
                classifier(normalise(pad_on_gpu(part.to(device), BATCH), preprocess))[: len(part)]
                .float()
                .cpu()
                for part in pixels.split(BATCH)
            ]
        return torch.cat(logits)
    finally:
        classifier.train(was_training)


def score(probabilities: Probabilities, labels: Labels) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy of probabilities [N, classes]."""
    return metrics.accuracy(probabilities, labels), metrics.log_loss(probabilities, labels)


def evaluate(
    run: Path,
    *,
    part: str = "valid",
    tta: TtaConfig | None = None,
    data_folder: Path | None = None,
    device: str = "auto",
    fit: str = "",
    log: Callable[[str], None] = log_to_stderr,
) -> EvaluationResult:
    """Evaluate a run's checkpoint on the photos of one split of its data set.

    Args:
        run: Run folder or checkpoint file.
        part: Split to evaluate: "valid", "test" or "train".
        tta: Test-time augmentation; None is off.
        data_folder: Folder of the photos, if they were moved after training.
        device: "auto", "cpu" or "cuda".
        fit: Value of `Preprocess.fit` in place of that of the checkpoint; "": that of the
            checkpoint.
        log: Function that is called with one line per photo that is missing or can't be read.

    Raises:
        DataError: There is no checkpoint, or the split has no photo that can be read.
        OptionError: `tta` needs random augmentations and the run's recipe can't be read, or
            `device` is not available.
    """
    draws = random_views(tta)
    recipe = recipe_of(run) if draws else None
    where = choose_precision(device, "fp32").device
    classifier, info = checkpoint.load(run)
    if fit:
        info = replace(info, preprocess=replace(info.preprocess, fit=fit))
    views = fixed_views(tta, info.preprocess)
    network = frozen_prefix.fused(classifier.to(where).eval())
    pixel_transform = (
        PixelTransform("train", info.preprocess, recipe.data.presize) if recipe else None
    )
    dataset = load_run_dataset(run, data_folder, "")
    if photos_changed(info.data, dataset):
        log(f"warning: the photos in {dataset.root} are not all as they were when {run} was made")
    samples: Sequence[Sample] = getattr(dataset, part)
    if not samples:
        raise DataError(f"{run} has no {part} photos")
    if not any(os.path.isfile(sample.path) for sample in samples):
        raise missing_photos_error(samples, samples, part, dataset.root)
    evaluated: list[Sample] = []
    by_view: list[Probabilities] = []  # [V, n, C] of each batch
    with progress_bar() as bar:
        title = f"{part} photos, {fit}" if fit else f"{part} photos"
        task = bar.add_task(title, total=len(samples))
        for batch in _batches(samples, info.preprocess, views, pixel_transform, log):
            # One view at a time, so that the plain view has the same batches as without TTA.
            rows = [
                softmax(logits_of(network, pixels, info.preprocess).numpy())
                for pixels in _views_of(batch, len(evaluated) // BATCH, recipe, draws, info)
            ]
            by_view.append(np.stack(rows))
            evaluated += batch.samples
            bar.advance(task, len(batch.samples))
    if not evaluated:
        raise DataError(f"none of the {len(samples)} {part} photos of {run} can be read")
    stacked = np.concatenate(by_view, axis=1)  # [V, N, C]
    plain, labels = stacked[0], np.array([sample.label for sample in evaluated], np.int64)
    averaged = combine(stacked, tta.average, tta.plain_weight) if tta else plain
    return EvaluationResult(
        *score(averaged, labels),
        photos=len(evaluated),
        views=len(stacked),
        broken=len(samples) - len(evaluated),
        probabilities=averaged,
        plain=plain,
        labels=labels,
        paths=tuple(sample.path for sample in evaluated),
        classes=info.classes,
        root=dataset.root,
    )


def recipe_of(run: Path) -> Recipe:
    """Read the recipe of a run.

    Raises:
        OptionError: The recipe is missing, or not valid in this version.
    """
    return load.read(checkpoint.run_folder_of(run) / "recipe.toml")


def write_csv(result: EvaluationResult, path: Path, *, safe: bool = False) -> None:
    """Write a CSV file with one line per photo.

    The columns are the path in the data folder, the label, the predicted class and its probability.

    Args:
        result: The answers.
        path: The file.
        safe: Whether texts that a spreadsheet takes for formulas are escaped.
    """
    escape = escape_formula if safe else str
    best = result.probabilities.argmax(axis=1)
    with (
        atomic_write(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        # Quote all: some Python versions leave a name with a carriage return unquoted.
        out = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        out.writerow(["path", "label", "predicted", "probability"])
        for photo, label, index, row in zip(
            result.paths, result.labels, best, result.probabilities, strict=True
        ):
            name = Path(os.path.relpath(photo, result.root)).as_posix()
            texts = name, result.classes[label], result.classes[index]
            out.writerow([*map(escape, texts), f"{row[index]:.6f}"])


class _Batch(NamedTuple):
    """A batch of n photos, at most `BATCH`.

    Random augmentations are computed from `squares` and `aspect`, as in training.

    Attributes:
        views: The views without random augmentation (crops, flips), uint8 [V, n, H, W, 3].
        squares: The photos resized to squares, uint8 [n, S, S, 3].
        aspect: Width divided by height of what each square shows, float32 [n].
    """

    samples: list[Sample]
    views: Tensor
    squares: Tensor
    aspect: Tensor


def _batches(
    samples: Sequence[Sample],
    preprocess: Preprocess,
    views: Sequence[View],
    pixel_transform: PixelTransform | None,
    log: Callable[[str], None],
) -> Iterator[_Batch]:
    """Read the photos and yield batches of `BATCH` readable ones; unreadable photos are logged."""

    def read(sample: Sample) -> tuple[Pixels, Pixels, float] | ImageError:
        square, aspect = np.empty((0, 0, 3), np.uint8), 1.0
        try:
            photo = decode.read(sample.path, preprocess=preprocess)
            if pixel_transform:
                to_square, whole = pixel_transform.to_square, photo
                if to_square.reduction(*photo.size) != preprocess.reduction(*photo.size):
                    whole = decode.read(sample.path, preprocess=to_square)
                square, aspect = pixel_transform(whole), pixel_transform.aspect(whole)
        except ImageError as error:
            return error
        return render(photo.image, preprocess, views, photo.area), square, aspect

    pending: list[tuple[Sample, tuple[Pixels, Pixels, float]]] = []

    def batch() -> _Batch:
        fixed, squares, aspects = zip(*(made for _, made in pending), strict=True)
        return _Batch(
            [sample for sample, _ in pending],
            torch.from_numpy(np.stack(fixed, axis=1)),
            torch.from_numpy(np.stack(squares)),
            torch.tensor(aspects, dtype=torch.float32),
        )

    with closing(map_ordered(read, samples, window=BATCH)) as results:
        for sample, made in zip(samples, results, strict=True):
            if isinstance(made, ImageError):
                log(f"skipped {sample.path}: {made}")
                continue
            pending.append((sample, made))
            if len(pending) == BATCH:
                yield batch()
                pending = []
    if pending:
        yield batch()


def _views_of(
    batch: _Batch, number: int, recipe: Recipe | None, draws: int, info: checkpoint.CheckpointInfo
) -> Iterator[Tensor]:
    """Yield the views of batch `number`, one view at a time: [n, H, W, 3] in 0..255.

    Random augmentations have the options of the stage in which the checkpoint was saved.
    """
    yield from batch.views
    if recipe is not None:
        name = info.metrics.get("stage")
        own = [recipe.augment_of(stage) for stage in recipe.stage if stage.name == name]
        for i in range(draws):
            yield draw(
                batch.squares,
                batch.aspect,
                (*own, recipe.augment)[0],
                seed=recipe.seed,
                view=number * draws + i,
                crop=info.preprocess.kept_share,
                size=info.preprocess.size,
            )
