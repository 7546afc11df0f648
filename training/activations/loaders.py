"""Where a stage's batches come from: augmented photos, run through whatever is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from serving.imaging.preprocess import Preprocess
from training.activations.store import CachedViews
from training.augmentation import mixup, transforms
from training.config.sections import AugmentConfig
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.models.classifier import normalise
from training.pixels.decoded import PixelSet
from training.pixels.gpu_rows import moved
from training.utils.device import filled, upload
from training.utils.precision import Precision
from training.utils.timer import Timer

FROZEN: Final = "frozen layers"
"""What the clock calls them."""


def frozen_batch(device: torch.device) -> int:
    """Photos that go through what is frozen at once: on a CPU as many as fit its cache."""
    return 16 if device.type == "cpu" else 128


@dataclass
class AugmentedPhotos:
    """Augmented photos of one stage: the same view of a photo is the same picture each time."""

    photos: PixelSet
    preprocess: Preprocess
    config: AugmentConfig
    precision: Precision
    seed: int
    timer: Timer = field(default_factory=Timer)

    def __call__(self, view: int, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of `parts`, int64 [n], and its photos augmented and normalised, [n, 3, H, W]."""
        device, size, crop = self.precision.device, self.preprocess.size, self.preprocess.crop
        draws = transforms.draw(self.config, self.photos.aspect, self.seed, view, crop=crop).to(
            device
        )
        with closing(self.photos.pixels.batches(parts)) as batches:
            for index, near in zip(parts, moved(parts, device), strict=True):
                with self.timer("waiting for pixels"):
                    pixels = next(batches).to(device)
                with self.timer("augmentation"), torch.no_grad():
                    cut = transforms.apply(pixels, draws[near], self.config, size)
                    images = normalise(cut, self.preprocess)
                yield index, images


@dataclass
class TrainLoader:
    """Training batches of one stage.

    views: how many views of each photo the epochs take turns with; 0 draws new ones each epoch.
    first_view: the number of the first. kept: the outputs of what is frozen for these views; None
    runs `prefix` on each batch. classes: how many, for labels of mixed photos. team: of which this
    process feeds its part.
    """

    draws: AugmentedPhotos
    prefix: nn.Module
    first_view: int = 0
    views: int = 0
    classes: int = 0
    kept: CachedViews | None = None
    process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def precision(self) -> Precision:
        """What it computes in."""
        return self.draws.precision

    @property
    def timer(self) -> Timer:
        """Where the seconds go."""
        return self.draws.timer

    def epoch(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled (inputs of the suffix, labels int64 [N]) of one epoch: this process's parts.

        Where mixup or cutmix blends photos the labels are shares, float32 [N, classes]. A last
        batch of one photo is dropped: BatchNorm can't learn from it.
        """
        place = self.first_view + epoch
        photos, device = self.draws.photos, self.precision.device
        generator = torch.Generator().manual_seed(self.draws.seed * 1_000_003 + place)
        order = torch.randperm(len(photos), generator=generator).split(batch_size)
        parts = [self.process_group.part(index) for index in order if len(index) > 1]
        if self.kept:
            self.prepare([epoch])
            rows = self.kept[self._view(epoch)]
            for index in parts:
                with self.timer("waiting for activations"):
                    inputs = upload(rows[upload(index, rows.device)], device)
                yield inputs, upload(photos.labels[index], device)
            return
        config = self.draws.config
        for step, (index, images) in enumerate(self.draws(self._view(epoch), parts)):
            labels = upload(photos.labels[index], device)
            if config.mixes:
                images, labels = mixup.mix(
                    config, images, labels, self.classes, self.draws.seed, place * 1_000_000 + step
                )
            with self.timer(FROZEN):
                inputs = run_frozen(self.prefix, images, self.precision)
            yield inputs, labels

    def sizes(self, batch_size: int) -> list[int]:
        """Photos of each batch of an epoch, all processes together."""
        full, rest = divmod(len(self.draws.photos), batch_size)
        return [batch_size] * full + [rest] * (rest >= 2)

    def prepare(self, epochs: Iterable[int]) -> None:
        """Compute the kept views of these epochs that are missing, under a bar of its own."""
        if self.kept:
            self.kept.prepare(dict.fromkeys(self._view(epoch) for epoch in epochs))

    def _view(self, epoch: int) -> int:
        return self.first_view + (epoch % self.views if self.views else epoch)


@torch.no_grad()
def run_frozen(prefix: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """Inputs through what is frozen; the inputs themselves where nothing is."""
    with precision.autocast():
        outputs: Tensor = prefix(inputs)
    return outputs


@dataclass
class ValidLoader:
    """Validation batches, as inputs of the suffix: iterate as often as there are epochs.

    keep: hold the frozen prefix's outputs after the first pass. below: batches that other stages
    use, too, and `prefix` goes on with. team: this process takes every `size`th of its batches, so
    that each is computed as in one process.
    """

    photos: PixelSet
    prefix: nn.Module
    preprocess: Preprocess
    precision: Precision
    keep: bool
    below: ValidLoader | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels int64 [N]); on a GPU there may be more inputs than labels: `filled`."""
        if self._kept:
            yield from self._kept
            return
        kept = []
        if self.below:
            self.below.process_group = self.process_group
        for inputs, labels in self.below or self._images():
            batch = run_frozen(self.prefix, inputs, self.precision), labels
            if self.keep:
                kept.append(batch)
            yield batch
        self._kept = kept

    def _images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(normalised photos [N, 3, H, W], labels)."""
        device = self.precision.device
        step = frozen_batch(device) * (2 if device.type == "cpu" else 1)
        parts = [slice(start, start + step) for start in range(0, len(self.photos), step)]
        parts = parts[self.process_group.rank :: self.process_group.size]
        for rows, pixels in zip(parts, self.photos.pixels.batches(parts), strict=True):
            images = normalise(filled(pixels.to(device), step), self.preprocess)
            yield images, upload(self.photos.labels[rows], device)
