"""`batch_size = "auto"`: the largest batch that the GPU's memory takes, found by trying."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.errors import WorkError
from training.activations import frozen_prefix
from training.activations.loaders import run_frozen
from training.augmentation import mixup, transforms
from training.config.schema import AUTO, Recipe, Stage
from training.data.dataset import Dataset
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.models.classifier import Classifier, normalise
from training.optim import optimizer as optim
from training.optim.ema import Ema
from training.pixels.gpu_rows import SHARE
from training.pixels.transform import PixelTransform
from training.utils import device, disk_cache
from training.utils.console import Log
from training.utils.precision import Precision

ON_CPU: Final = 32
"""Where there is no memory of its own to fill; larger batches are no faster there."""

SMALLEST: Final = 8
LARGEST: Final = 1024

MARGIN: Final = 0.9
"""Of the memory that is free: the rest is for what libraries take, and for what lies scattered."""

RECORDED: Final = 2
"""Times the peak that recorded steps may take: the odd batch that ends an epoch has no part of what
the recording holds."""

STEPS: Final = 2
"""Of a trial: the optimiser's own memory is taken at the first."""


class Memory(Protocol):
    """A device's memory, as it was before the trials."""

    free: int

    def begin(self) -> None:
        """Forget the peak."""
        ...

    def peak(self) -> int:
        """The most bytes that were in use since `begin`, beside what was in use before."""
        ...


class CudaMemory:
    """A GPU's. free: bytes that can be taken."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._base, self.free = torch.cuda.memory_allocated(where), device.free(where)

    def begin(self) -> None:
        """As `Memory`."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._where)

    def peak(self) -> int:
        """As `Memory`."""
        return torch.cuda.max_memory_allocated(self._where) - self._base


def settle(
    recipe: Recipe,
    classifier: Classifier,
    stages: Sequence[Stage],
    dataset: Dataset,
    precision: Precision,
    log: Log,
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    memory: Memory | None = None,
) -> Recipe:
    """The recipe with a number for its batch size; as it is where it has one.

    On a GPU: the largest power of two, from 8 to 1024 and not more than there are training photos,
    with which real steps of the most demanding stages fit into its memory beside the pixels. The
    classifier and the random state are left as they are, bit for bit.

    Args:
        recipe: What to do.
        classifier: On the CPU.
        stages: As they are run.
        dataset: The photos.
        precision: What to compute in, and where.
        say: Takes a line for a person.
        team: The processes that share a batch, each with such a GPU: one of them measures, and the
            number is for all together.
        memory: Of the device; on a CPU there is none unless given.

    Raises:
        WorkError: Not even the smallest batch fits.
    """
    if recipe.batch_size != AUTO:
        return recipe

    def found() -> int:
        if memory is None and precision.device.type == "cpu":
            log(f"batch_size = 'auto': {ON_CPU}; on a CPU")
            return ON_CPU
        there = memory or CudaMemory(precision.device)
        room = int(MARGIN * there.free) - _for_pixels(recipe, stages, dataset, there.free)
        room //= RECORDED if recipe.compile == "cuda_graphs" else 1
        most = max(min(LARGEST, len(dataset.train) // process_group.size), SMALLEST)
        own = copy.deepcopy(classifier)
        classes = len(dataset.classes)
        size, peak = _measured(recipe, own, stages, classes, precision, there, room, most)
        size *= process_group.size
        has = (
            f"{disk_cache.gigabytes(peak)} of {disk_cache.gigabytes(room)} that the GPU has for it"
        )
        log(f"batch_size = 'auto': {size}; {has}")
        return size

    return recipe.model_copy(update={"batch_size": process_group.decide(found)})


def _measured(
    recipe: Recipe,
    own: Classifier,
    stages: Sequence[Stage],
    classes: int,
    precision: Precision,
    memory: Memory,
    room: int,
    most: int,
) -> tuple[int, int]:
    """The largest batch, up to `most`, that fits into `room` in every stage; its peak in bytes.

    own: a classifier that may be spoilt.
    """
    where, peak = precision.device, 0
    own.to(where).to(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        for stage in demanding(own, recipe, stages):
            trial = BatchSizeTrial(recipe, own, stage, classes, precision)
            gc.collect()  # of the trial before: networks and errors hold one another
            most, peak = largest(trial, memory, room, most)
            if not most:
                raise WorkError(
                    f"batch_size = 'auto': stage {stage.name} does not fit the GPU with even "
                    f"{SMALLEST} photos a step; give batch_size a smaller number, or choose a "
                    "smaller preprocess.size"
                )
    return most, peak


def largest(
    trial: Callable[[int], object], memory: Memory, room: int, most: int
) -> tuple[int, int]:
    """The largest batch by doubling that `trial` bears, and its peak in bytes; (0, 0) for none."""
    best, size = (0, 0), SMALLEST
    while size <= most:
        memory.begin()
        fits = _bears(trial, size)
        if not fits or memory.peak() > room:
            break
        best = size, memory.peak()
        size *= 2
    return best


def _bears(trial: Callable[[int], object], size: int) -> bool:
    # Alone in a function, so that the error, which holds the tensors of the trial, is gone after.
    try:
        trial(size)
    except torch.OutOfMemoryError:
        return False
    return True


def demanding(classifier: Classifier, recipe: Recipe, stages: Sequence[Stage]) -> Iterator[Stage]:
    """The stages than which no other one trains more at the same or a larger image size."""
    asks: list[tuple[int, int]] = []
    for stage in stages:
        prefix = classifier.freezing_for(stage).prefix
        asks.append((-prefix, recipe.preprocess_of(stage).size))
    for number, (stage, own) in enumerate(zip(stages, asks, strict=True)):
        others = [*asks[:number], *asks[number + 1 :]]
        above = (o[0] >= own[0] and o[1] >= own[1] and o != own for o in others)
        if not any(above) and own not in asks[:number]:
            yield stage


@dataclass
class BatchSizeTrial:
    """Steps of a stage as training makes them, on random pixels; call it with a batch size.

    classifier: on the device, its own: it is trained.
    """

    recipe: Recipe
    classifier: Classifier
    stage: Stage
    classes: int
    precision: Precision

    def __post_init__(self) -> None:
        self.classifier.freeze_for(self.stage)
        self.classifier.train()
        self._prefix = frozen_prefix.fused(self.classifier.prefix)
        stage, config = self.stage, self.recipe.optimizer
        lr = 1.0 if stage.lr == "find" else stage.lr
        self._optimizer = optim.build(self.classifier, config, stage, lr)
        self._ema = Ema(self.classifier, config.ema) if config.ema else None

    def __call__(self, size: int) -> None:
        """Forward, backward and update."""
        config, suffix = self.recipe.optimizer, self.classifier.suffix
        for _ in range(STEPS):
            for inputs, labels in [self._batch(size) for _ in range(config.accumulate)]:
                with self.precision.autocast():
                    logits = suffix(inputs)
                smoothing = self.recipe.label_smoothing
                F.cross_entropy(logits.float(), labels, label_smoothing=smoothing).backward()
            optim.step(self._optimizer, config)
            if self._ema:
                self._ema.update()

    @torch.no_grad()
    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random pixels on the way that photos go: (inputs of the suffix, labels)."""
        recipe, where = self.recipe, self.precision.device
        preprocess = recipe.preprocess_of(self.stage)
        # A policy goes photo by photo: it takes time, and no memory to speak of.
        config = recipe.augment_of(self.stage).model_copy(update={"policy": "none"})
        side = PixelTransform("train", preprocess, recipe.data.presize).side
        pixels = torch.randint(256, (size, side, side, 3), dtype=torch.uint8, device=where)
        draws = transforms.draw(config, torch.ones(size), recipe.seed, 0, crop=preprocess.crop)
        images = normalise(
            transforms.apply(pixels, draws.to(where), config, preprocess.size), preprocess
        )
        labels = torch.arange(size, device=where) % self.classes
        if config.mixes:
            images, labels = mixup.mix(config, images, labels, self.classes, recipe.seed, 0)
        return run_frozen(self._prefix, images, self.precision), labels


def _for_pixels(recipe: Recipe, stages: Sequence[Stage], dataset: Dataset, free: int) -> int:
    """Bytes of the rows that will lie on the GPU, at the largest image size."""
    taken = 0
    size = max((recipe.preprocess_of(stage) for stage in stages), key=lambda p: p.size)
    for part, photos in (("train", dataset.train), ("valid", dataset.valid)):
        side = PixelTransform(
            "train" if part == "train" else "valid", size, recipe.data.presize
        ).side
        rows = len(photos) * 3 * side**2
        taken += rows if rows <= SHARE * (free - taken) else 0
    return taken
