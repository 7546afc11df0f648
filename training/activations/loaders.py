"""Data loaders of a training stage. A batch is a pair: inputs of the trainable layers, and labels.

The frozen layers at the start of the network are called the prefix. The loaders run the prefix on
the photos, or read the outputs of the prefix from a cache. If no layer is frozen, the inputs are
the photos themselves. The training photos are augmented: view number n of a photo is the photo
after the random augmentation number n.
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
"""Name under which the timer counts the forward passes of the frozen layers."""


def frozen_batch(device: torch.device) -> int:
    """Return the batch size for the frozen layers. On a CPU, a batch must fit the CPU's cache."""
    return 16 if device.type == "cpu" else 128


@dataclass
class AugmentedPhotos:
    """Augmented photos of one training stage.

    Augmentation is deterministic: view number n of a photo is always the same picture.
    """

    photos: PixelSet
    preprocess: Preprocess
    config: AugmentConfig
    precision: Precision
    seed: int
    timer: Timer = field(default_factory=Timer)

    def __call__(self, view: int, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Augment photos batch by batch.

        Args:
            view: Number of the augmented view.
            parts: For each batch, the indices of its photos, int64 [n].

        Yields:
            The indices of a batch, and its augmented and normalised photos, [n, 3, H, W].
        """
        device, size = self.precision.device, self.preprocess.size
        crop = self.preprocess.kept_share
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
        first_view: Number of the augmented view of the first epoch.
        views: Number of augmented views of each photo. The epochs cycle through these views; 0:
            every epoch uses a new view.
        classes: Number of classes, for the soft labels of mixup and cutmix.
        cached: Cached outputs of `prefix` for the views; None: `prefix` runs on every batch.
        process_group: The group of training processes. Each process gets a shard of every batch.
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
        """Timer of decoding, augmentation and the frozen layers."""
        return self.augmented.timer

    def epoch(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the shuffled batches of an epoch: (inputs of the trainable layers, labels [N]).

        Labels are int64 [N]; with mixup or cutmix, float32 [N, classes]. If training runs in
        several processes, only this process's shard of each batch is yielded. A last batch of only
        one photo is dropped: BatchNorm can't train on a single photo.
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
        """Return the size of each batch of an epoch, summed over all training processes."""
        full, rest = divmod(len(self.augmented.photos), batch_size)
        return [batch_size] * full + [rest] * (rest >= 2)

    def prepare(self, epochs: Iterable[int]) -> None:
        """Compute and cache the outputs of `prefix` for these epochs, with a progress bar.

        Outputs that are cached already are not computed again.
        """
        if self.cached:
            self.cached.prepare(dict.fromkeys(self._view(epoch) for epoch in epochs))

    def _view(self, epoch: int) -> int:
        return self.first_view + (epoch % self.views if self.views else epoch)


@torch.no_grad()
def run_frozen(prefix: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """Return the outputs of the frozen layers; the inputs themselves if `prefix` is empty."""
    with precision.autocast():
        outputs: Tensor = prefix(inputs)
    return outputs


@dataclass
class ValidLoader:
    """Validation batches: the outputs of the frozen layers, and labels.

    A loader can be iterated many times.

    Attributes:
        photos: The validation photos.
        prefix: The frozen layers.
        preprocess: Preprocessing of the model; here only its normalisation is applied.
        precision: Device and dtype.
        cache_outputs: Whether the outputs of `prefix` are kept in memory after the first pass.
        source: Another loader, shared with other stages. Its batches are the inputs of `prefix`.
            None: the inputs are photos.
        process_group: The group of training processes. Process i of n takes batches i, i + n, ...
            The division of the photos into batches does not depend on n.
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
        """Yield batches: (inputs of the trainable layers, labels int64 [N]).

        On a GPU the inputs may have more than N rows, because `pad_on_gpu` fills the last batch.
        """
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
        """Yield batches: (normalised photos [N, 3, H, W], labels int64 [N])."""
        device = self.precision.device
        step = frozen_batch(device) * (2 if device.type == "cpu" else 1)
        parts = [slice(start, start + step) for start in range(0, len(self.photos), step)]
        parts = parts[self.process_group.rank :: self.process_group.size]
        for rows, pixels in zip(parts, self.photos.pixels.batches(parts), strict=True):
            images = normalise(pad_on_gpu(pixels.to(device), step), self.preprocess)
            yield images, upload(self.photos.labels[rows], device)
