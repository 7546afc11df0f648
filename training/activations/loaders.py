"""Data loaders of a stage: frozen layers' outputs for augmented photos, computed or cached.

The frozen layers at the start of a network are its prefix; the layers that train are its suffix. A
view is one random augmentation of a photo.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from serving.imaging.preprocess import Preprocess
from training.activations.cached_views import CachedViews
from training.augmentation import mixup, transforms
from training.config.sections import AugmentConfig
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.models.classifier import normalise
from training.pixels.decoded import PixelSet
from training.pixels.gpu_rows import upload_indices
from training.utils.device import pad_on_gpu, upload
from training.utils.precision import Precision
from training.utils.timer import Timer

FROZEN: Final = "frozen layers"
"""Timer activity: forward passes of the frozen layers."""


def frozen_batch(device: torch.device) -> int:
    """Batch size of the frozen layers. On a CPU, small enough for its cache."""
    return 16 if device.type == "cpu" else 128


@dataclass
class AugmentedPhotos:
    """Augmented photos of one stage. A view of a photo is the same picture at every call."""

    photos: PixelSet
    preprocess: Preprocess
    config: AugmentConfig
    precision: Precision
    seed: int
    timer: Timer = field(default_factory=Timer)

    def __call__(self, view: int, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each index in `parts`, int64 [n]: (index, normalised photos [n, 3, H, W])."""
        device, size, crop = self.precision.device, self.preprocess.size, self.preprocess.crop
        params = transforms.draw(self.config, self.photos.aspect, self.seed, view, crop=crop).to(
            device
        )
        with closing(self.photos.pixels.batches(parts)) as batches:
            for index, on_device in zip(parts, upload_indices(parts, device), strict=True):
                with self.timer("waiting for pixels"):
                    pixels = next(batches).to(device)
                with self.timer("augmentation"), torch.no_grad():
                    augmented = transforms.apply(pixels, params[on_device], self.config, size)
                    images = normalise(augmented, self.preprocess)
                yield index, images


@dataclass
class TrainLoader:
    """Training batches of one stage.

    Attributes:
        augmented: The augmented training photos.
        prefix: The frozen layers.
        first_view: Number of the first view.
        views: The epochs cycle through this many views of each photo; 0: a new view each epoch.
        classes: Number of classes, for the soft labels of mixed photos.
        cached: Outputs of `prefix` for these views; None: `prefix` runs on every batch.
        process_group: The processes that share each batch; this process gets its shard.
    """

    augmented: AugmentedPhotos
    prefix: nn.Module
    first_view: int = 0
    views: int = 0
    classes: int = 0
    cached: CachedViews | None = None
    process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def precision(self) -> Precision:
        """Device and dtype."""
        return self.augmented.precision

    @property
    def timer(self) -> Timer:
        """The timer of the photos."""
        return self.augmented.timer

    def epoch(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's shards of the shuffled batches: (inputs of the suffix, labels int64 [N]).

        With mixup or cutmix, labels are float32 [N, classes]. A last batch of one photo is dropped,
        because BatchNorm can't train on it.
        """
        position = self.first_view + epoch
        photos, device = self.augmented.photos, self.precision.device
        generator = torch.Generator().manual_seed(self.augmented.seed * 1_000_003 + position)
        order = torch.randperm(len(photos), generator=generator).split(batch_size)
        parts = [self.process_group.shard(index) for index in order if len(index) > 1]
        if self.cached:
            self.prepare([epoch])
            rows = self.cached[self._view(epoch)]
            for index in parts:
                with self.timer("waiting for activations"):
                    inputs = upload(rows[upload(index, rows.device)], device)
                yield inputs, upload(photos.labels[index], device)
            return
        config, seed = self.augmented.config, self.augmented.seed
        for step, (index, images) in enumerate(self.augmented(self._view(epoch), parts)):
            labels = upload(photos.labels[index], device)
            if config.mixes:
                mix_step = position * 1_000_000 + step
                images, labels = mixup.mix(config, images, labels, self.classes, seed, mix_step)
            with self.timer(FROZEN):
                inputs = run_frozen(self.prefix, images, self.precision)
            yield inputs, labels

    def batch_sizes(self, batch_size: int) -> list[int]:
        """The size of each batch of an epoch, over all processes."""
        full, rest = divmod(len(self.augmented.photos), batch_size)
        return [batch_size] * full + [rest] * (rest >= 2)

    def prepare(self, epochs: Iterable[int]) -> None:
        """Compute the missing cached views of these epochs, with a progress bar."""
        if self.cached:
            self.cached.prepare(dict.fromkeys(self._view(epoch) for epoch in epochs))

    def _view(self, epoch: int) -> int:
        return self.first_view + (epoch % self.views if self.views else epoch)


@torch.no_grad()
def run_frozen(prefix: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """The outputs of the frozen layers; the inputs themselves if `prefix` is empty."""
    with precision.autocast():
        outputs: Tensor = prefix(inputs)
    return outputs


@dataclass
class ValidLoader:
    """Validation batches after the frozen layers, ready for the layers that train.

    A loader can be iterated many times.

    Attributes:
        photos: The validation photos.
        prefix: The frozen layers.
        preprocess: Normalises the photos.
        precision: Device and dtype.
        cache_outputs: Keep the outputs of `prefix` in memory after the first pass.
        source: A loader whose batches are the inputs of `prefix`, shared with other stages;
            None: `prefix` takes photos.
        process_group: Process i of n takes batches i, i + n, ..., so the batches are the same as
            with one process.
    """

    photos: PixelSet
    prefix: nn.Module
    preprocess: Preprocess
    precision: Precision
    cache_outputs: bool
    source: ValidLoader | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    _cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels int64 [N]); on a GPU `pad_on_gpu` may have added rows to the inputs."""
        if self._cached:
            yield from self._cached
            return
        cached = []
        if self.source:
            self.source.process_group = self.process_group
        for inputs, labels in self.source or self._images():
            batch = run_frozen(self.prefix, inputs, self.precision), labels
            if self.cache_outputs:
                cached.append(batch)
            yield batch
        self._cached = cached

    def _images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(normalised photos [N, 3, H, W], labels)."""
        device = self.precision.device
        step = frozen_batch(device) * (2 if device.type == "cpu" else 1)
        parts = [slice(start, start + step) for start in range(0, len(self.photos), step)]
        parts = parts[self.process_group.rank :: self.process_group.size]
        for rows, pixels in zip(parts, self.photos.pixels.batches(parts), strict=True):
            images = normalise(pad_on_gpu(pixels.to(device), step), self.preprocess)
            yield images, upload(self.photos.labels[rows], device)
