"""Where a stage's batches come from: augmented photos, run through whatever is frozen.

A frozen prefix is a function without state, so its output for a given view of a photo never
changes: for a few views of every photo it is computed once and kept in memory, and the epochs take
turns with the views. Beyond the memory budget, or with `views = 0`, views are drawn anew each
epoch and the prefix runs each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from serving.preprocess import Preprocess
from serving.progress import progress_bar
from training import augment, mixing
from training.ema import Ema
from training.model import Classifier, normalise
from training.options import Recipe, Stage
from training.pixels import Photos, PixelSet
from training.precision import Precision
from training.sections import AugmentConfig

ACTIVATION_BYTES: Final = 2 * 2**30

# The frozen part of a small network runs fastest in batches that fit the processor's cache.
PREFIX_BATCH = 16


@dataclass
class TrainFeed:
    """Training batches of one stage.

    views: how many views are cached; 0 caches nothing. first_view: where this stage's own views
    begin, so that stages see different ones. classes: how many, for labels of mixed photos.
    """

    photos: PixelSet
    prefix: nn.Sequential
    preprocess: Preprocess
    config: AugmentConfig
    precision: Precision
    seed: int
    first_view: int = 0
    views: int = 0
    classes: int = 0
    _cached: list[Tensor] = field(default_factory=list)

    def epoch(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled (inputs of the suffix, labels int64 [N]) of one epoch.

        Where mixup or cutmix blends photos the labels are shares, float32 [N, classes]. A last
        batch of one photo is dropped: BatchNorm can't learn from it.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.first_view + epoch)
        order = torch.randperm(len(self.photos), generator=generator).split(batch_size)
        parts = [index for index in order if len(index) > 1]
        view = epoch % self.views if self.views else epoch
        draws = None if self.views else self._draw(view)
        self.fill()
        device = self.precision.device
        if draws is None:
            for index in parts:
                labels = self.photos.labels[index].to(device)
                yield self._cached[view][index].to(device), labels
            return
        for step, (index, images) in enumerate(self._images(parts, draws)):
            labels = self.photos.labels[index].to(device)
            if self.config.mixes:
                place = (self.first_view + epoch) * 1_000_000 + step
                images, labels = mixing.mix(
                    self.config, images, labels, self.classes, self.seed, place
                )
            yield self._through(images), labels

    def steps(self, batch_size: int) -> int:
        """Batches an epoch."""
        full, rest = divmod(len(self.photos), batch_size)
        return full + (rest >= 2)

    def _draw(self, view: int) -> augment.Draws:
        return augment.draw(
            self.config,
            self.photos.aspect,
            self.seed,
            self.first_view + view,
            crop=self.preprocess.crop,
        )

    def _images(
        self, parts: Sequence[Tensor], draws: augment.Draws
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each index, and its photos augmented and normalised: float32 [N, 3, H, W]."""
        device, size = self.precision.device, self.preprocess.size
        with closing(self.photos.pixels.batches(parts)) as batches:
            for index, pixels in zip(parts, batches, strict=True):
                with torch.no_grad():
                    drawn = draws[index].to(device)
                    cut = augment.apply(pixels.to(device), drawn, self.config, size)
                    images = normalise(cut, self.preprocess)
                yield index, images

    @torch.no_grad()
    def _through(self, images: Tensor) -> Tensor:
        return _through(self.prefix, images, self.precision)

    def fill(self) -> None:
        """Run the prefix over every cached view, once; nothing to do where nothing is cached."""
        if not self.views or self._cached:
            return
        with progress_bar() as bar:
            parts = torch.arange(len(self.photos)).split(PREFIX_BATCH)
            task = bar.add_task("frozen part", total=self.views * len(parts))
            for view in range(self.views):
                draws = self._draw(view)
                rows = _Rows(len(self.photos))
                for index, images in self._images(parts, draws):
                    rows.put(index, self._through(images))
                    bar.advance(task)
                self._cached.append(rows.data)


def _through(prefix: nn.Sequential, images: Tensor, precision: Precision) -> Tensor:
    """Normalised images through what is frozen; the images themselves where nothing is."""
    with precision.autocast():
        outputs: Tensor = prefix(images)
    return outputs


class _Rows:
    """One tensor filled by batches, in the layout of the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.data = torch.empty(0)

    def put(self, index: Tensor, rows: Tensor) -> None:
        if not len(self.data):
            layout = torch.channels_last if rows.ndim == 4 else torch.contiguous_format
            shape = (self.count, *rows.shape[1:])
            self.data = torch.empty(shape, dtype=rows.dtype, memory_format=layout)
        self.data[index] = rows.cpu()


@torch.no_grad()
def affordable_views(
    wanted: int, photos: int, prefix: nn.Sequential, size: int, precision: Precision, budget: int
) -> int:
    """How many of the `wanted` views of all photos fit into `budget` bytes.

    0, so nothing is cached, when nothing is frozen.
    """
    if not wanted or len(prefix) == 0:
        return 0
    with precision.autocast():
        probe: Tensor = prefix(torch.zeros(1, 3, size, size, device=precision.device))
    return min(wanted, budget // (probe.numel() * probe.element_size() * photos))


@dataclass
class ValidFeed:
    """Validation batches, as inputs of the suffix: iterate as often as there are epochs.

    keep: hold the frozen prefix's outputs after the first pass.
    """

    photos: PixelSet
    prefix: nn.Sequential
    preprocess: Preprocess
    precision: Precision
    keep: bool
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels int64 [N])."""
        if self._kept:
            yield from self._kept
            return
        step = 2 * PREFIX_BATCH
        parts = [slice(start, start + step) for start in range(0, len(self.photos), step)]
        for rows, pixels in zip(parts, self.photos.pixels.batches(parts), strict=True):
            batch = self._run(rows, pixels)
            if self.keep:
                self._kept.append(batch)
            yield batch

    @torch.no_grad()
    def _run(self, rows: slice, pixels: Tensor) -> tuple[Tensor, Tensor]:
        device = self.precision.device
        images = normalise(pixels.to(device), self.preprocess)
        inputs = _through(self.prefix, images, self.precision)
        return inputs, self.photos.labels[rows].to(device)


def feeds(
    classifier: Classifier,
    photos: Photos,
    stage: Stage,
    recipe: Recipe,
    precision: Precision,
    first_view: int,
    say: Callable[[str], None],
    ema: Ema | None = None,
) -> tuple[TrainFeed, ValidFeed]:
    """Freeze what the stage freezes, and open its two streams of batches.

    With `ema` the averages are validated: what an earlier stage trained and this one freezes goes
    on moving among them, and its outputs are not kept.
    """
    classifier.freeze(
        stage.unfreeze, batchnorm=stage.batchnorm, frozen_batchnorm=stage.frozen_batchnorm
    )
    classifier.eval()
    preprocess = recipe.preprocess_of(stage)
    train, valid = photos.at(preprocess)
    prefix, config = classifier.prefix, recipe.augment_of(stage)
    wanted = 0 if config.mixes else min(stage.views, stage.epochs)
    size = preprocess.size
    views = affordable_views(wanted, len(train), prefix, size, precision, ACTIVATION_BYTES)
    why = ""
    if stage.views and len(prefix) and config.mixes:
        why = "mixup and cutmix blend photos: no views are cached"
    elif stage.views and not len(prefix) and stage.frozen_batchnorm != "eval":
        why = "the frozen BatchNorms move: no views are cached"
    elif views < wanted and len(prefix):
        why = f"{views} of {wanted} views fit into {ACTIVATION_BYTES >> 30} GiB"
    if why:
        say(f"{stage.name:>8}  {why}")
    classes = len(photos.dataset.classes)
    seed = recipe.seed
    feed = TrainFeed(train, prefix, preprocess, config, precision, seed, first_view, views, classes)
    keep = affordable_views(1, len(valid), prefix, size, precision, ACTIVATION_BYTES // 2) > 0
    if ema:
        frozen = {id(tensor) for tensor in prefix.state_dict(keep_vars=True).values()}
        state = classifier.state_dict(keep_vars=True)
        keep = keep and ema.settled(name for name, value in state.items() if id(value) in frozen)
    return feed, ValidFeed(valid, prefix, preprocess, precision, keep)
