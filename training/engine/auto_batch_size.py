"""Implementation of `batch_size = "auto"`: find the largest batch that fits into GPU memory.

Training steps are run on random pixels, with a batch size that doubles until memory runs out.
"""

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
from training.optim.ema import Ema
from training.optim.optimizer import build_optimizer, optimizer_step
from training.pixels.gpu_rows import GPU_MEMORY_SHARE
from training.pixels.transform import PixelTransform
from training.utils import disk_cache
from training.utils.console import Log
from training.utils.device import free_memory
from training.utils.precision import Precision

ON_CPU: Final = 32
"""Batch size on a CPU, where larger batches are not faster."""

SMALLEST: Final = 8
LARGEST: Final = 1024

MARGIN: Final = 0.9
"""Share of the free memory that may be used; the rest is for libraries and fragmentation."""

CUDA_GRAPH_FACTOR: Final = 2
"""Peak memory of training with CUDA graphs, divided by the peak of a trial without CUDA graphs. The
factor is above 1 because the smaller last batch of an epoch can't use the memory that the graphs
hold."""

STEPS: Final = 2
"""Optimizer steps of a trial. The first step allocates the optimizer's state at its end, so only
the second step shows the peak."""


class DeviceMemory(Protocol):
    """Memory statistics of a device.

    Attributes:
        free: Number of bytes that could be allocated before the trials.
    """

    free: int

    def begin(self) -> None:
        """Reset the peak that `peak` reports."""
        ...

    def peak(self) -> int:
        """Return the peak of allocated bytes since `begin`.

        Bytes that were allocated before the trials are not counted.
        """
        ...


class CudaMemory:
    """Memory statistics of a GPU, from torch's CUDA allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base, self.free = torch.cuda.memory_allocated(device), free_memory(device)

    def begin(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._base


def resolve_batch_size(
    recipe: Recipe,
    classifier: Classifier,
    stages: Sequence[Stage],
    dataset: Dataset,
    precision: Precision,
    log: Log,
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    memory: DeviceMemory | None = None,
) -> Recipe:
    """Return the recipe with `batch_size = "auto"` replaced by a number.

    A recipe that has a number already is returned unchanged. On a CPU the number is 32. On GPUs it
    is the number of processes times the photos per process. The photos per process are the largest
    power of two for which training fits into GPU memory together with the decoded photos stored
    there. This power of two is at least 8. It is at most 1024, and at most the number of training
    photos per process, unless that number is below 8.

    The weights of `classifier` and the random state do not change.

    Args:
        recipe: The recipe.
        classifier: The network, on the CPU.
        stages: The stages, as `plan.stages_of` returns them.
        dataset: The photos.
        precision: Device and dtype of the training.
        log: Function that is called with each log line.
        process_group: The processes that split a batch. Their GPUs must be of the same kind,
            because only process 0 measures.
        memory: Memory statistics of the device, used instead of the GPU's own. None: the GPU's own.

    Raises:
        WorkError: Training with 8 photos per batch does not fit into the GPU memory.
    """
    if recipe.batch_size != AUTO:
        return recipe

    def measure() -> int:
        if memory is None and precision.device.type == "cpu":
            log(f"batch_size = 'auto': {ON_CPU}; on a CPU")
            return ON_CPU
        device_memory = memory or CudaMemory(precision.device)
        free = device_memory.free
        available = int(MARGIN * free) - _pixel_bytes(recipe, stages, dataset, free)
        available //= CUDA_GRAPH_FACTOR if recipe.compile == "cuda_graphs" else 1
        most = max(min(LARGEST, len(dataset.train) // process_group.size), SMALLEST)
        size, peak = _largest_batch(
            recipe,
            copy.deepcopy(classifier),
            stages,
            len(dataset.classes),
            precision,
            device_memory,
            available,
            most,
        )
        size *= process_group.size
        used, limit = disk_cache.format_size(peak), disk_cache.format_size(available)
        log(f"batch_size = 'auto': {size}; uses {used} of {limit} available GPU memory")
        return size

    return recipe.model_copy(update={"batch_size": process_group.broadcast_object(measure)})


def _largest_batch(
    recipe: Recipe,
    classifier: Classifier,
    stages: Sequence[Stage],
    classes: int,
    precision: Precision,
    memory: DeviceMemory,
    available: int,
    most: int,
) -> tuple[int, int]:
    """Return the largest batch size, up to `most`, with which every stage fits into memory.

    A stage fits if its training steps need at most `available` bytes. The second value returned is
    the peak memory of the last stage tried, in bytes. The trials change the weights of
    `classifier`.

    Raises:
        WorkError: The smallest batch size does not fit.
    """
    device, peak = precision.device, 0
    classifier.to(device).to(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for stage in most_demanding(classifier, recipe, stages):
            trial = BatchSizeTrial(recipe, classifier, stage, classes, precision)
            gc.collect()  # the previous trial's tensors are in reference cycles
            most, peak = largest_fitting(trial, memory, available, most)
            if not most:
                raise WorkError(
                    f"batch_size = 'auto': stage {stage.name} does not fit the GPU with even "
                    f"{SMALLEST} photos a step; give batch_size a smaller number, or choose a "
                    "smaller preprocess.size"
                )
    return most, peak


def largest_fitting(
    trial: Callable[[int], object], memory: DeviceMemory, available: int, most: int
) -> tuple[int, int]:
    """Find the largest batch size that fits into memory, by trials with 8, 16, 32, ... photos.

    Args:
        trial: Function that trains with a given batch size.
        memory: Memory statistics of the device.
        available: Number of bytes that a trial may need.
        most: Upper limit of the batch size.

    Returns:
        The batch size, and the peak memory of its trial in bytes; (0, 0) if 8 does not fit.
    """
    best, size = (0, 0), SMALLEST
    while size <= most:
        memory.begin()
        fits = _fits(trial, size)
        if not fits or memory.peak() > available:
            break
        best = size, memory.peak()
        size *= 2
    return best


def _fits(trial: Callable[[int], object], size: int) -> bool:
    # A separate function, because the error, which references the tensors, is freed at its end.
    try:
        trial(size)
    except torch.OutOfMemoryError:
        return False
    return True


def most_demanding(
    classifier: Classifier, recipe: Recipe, stages: Sequence[Stage]
) -> Iterator[Stage]:
    """Yield the stages whose training may need the most memory.

    A stage is left out if another stage trains at least as many layers on images at least as large.
    """
    demands: list[tuple[int, int]] = []
    for stage in stages:
        prefix = classifier.freezing_for(stage).prefix
        demands.append((-prefix, recipe.preprocess_of(stage).size))
    for number, (stage, own) in enumerate(zip(stages, demands, strict=True)):
        others = [*demands[:number], *demands[number + 1 :]]
        above = (o[0] >= own[0] and o[1] >= own[1] and o != own for o in others)
        if not any(above) and own not in demands[:number]:
            yield stage


@dataclass
class BatchSizeTrial:
    """Callable that trains a stage on random pixels with a given batch size.

    Attributes:
        recipe: The recipe that the stage belongs to.
        classifier: The network, on the device. The training steps change its weights.
        stage: The stage.
        classes: Number of classes.
        precision: Device and dtype of the training.
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
        self._optimizer = build_optimizer(self.classifier, config, stage, lr)
        self._ema = Ema(self.classifier, config.ema) if config.ema else None

    def __call__(self, size: int) -> None:
        """Run `STEPS` optimizer steps with batches of `size` photos."""
        config, suffix = self.recipe.optimizer, self.classifier.suffix
        for _ in range(STEPS):
            for inputs, labels in [self._batch(size) for _ in range(config.accumulate)]:
                with self.precision.autocast():
                    logits = suffix(inputs)
                smoothing = self.recipe.label_smoothing
                F.cross_entropy(logits.float(), labels, label_smoothing=smoothing).backward()
            optimizer_step(self._optimizer, config)
            if self._ema:
                self._ema.update()

    @torch.no_grad()
    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return inputs of the trainable layers, and labels.

        The inputs are computed from random pixels by the same augmentation and frozen layers as in
        training.
        """
        recipe, where = self.recipe, self.precision.device
        preprocess = recipe.preprocess_of(self.stage)
        # Without the policy, which processes one photo at a time and needs hardly any memory.
        config = recipe.augment_of(self.stage).model_copy(update={"policy": "none"})
        side = PixelTransform("train", preprocess, recipe.data.presize).side
        pixels = torch.randint(256, (size, side, side, 3), dtype=torch.uint8, device=where)
        draws = transforms.draw(
            config, torch.ones(size), recipe.seed, 0, crop=preprocess.kept_share
        )
        images = normalise(
            transforms.apply(pixels, draws.to(where), config, preprocess.size), preprocess
        )
        labels = torch.arange(size, device=where) % self.classes
        if config.mixes:
            images, labels = mixup.mix(config, images, labels, self.classes, recipe.seed, 0)
        return run_frozen(self._prefix, images, self.precision), labels


def _pixel_bytes(recipe: Recipe, stages: Sequence[Stage], dataset: Dataset, free: int) -> int:
    """Return the number of bytes of decoded photos that training will store in GPU memory.

    The photos are counted at the largest image size of all stages. A split (train or valid) that is
    too large for GPU memory counts as 0, because it stays in CPU memory.
    """
    taken = 0
    size = max((recipe.preprocess_of(stage) for stage in stages), key=lambda p: p.size)
    for part, photos in (("train", dataset.train), ("valid", dataset.valid)):
        side = PixelTransform(
            "train" if part == "train" else "valid", size, recipe.data.presize
        ).side
        rows = len(photos) * 3 * side**2
        taken += rows if rows <= GPU_MEMORY_SHARE * (free - taken) else 0
    return taken
