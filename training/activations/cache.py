"""What frozen layers compute is computed once, and kept.

A frozen prefix is a function without state, so its output for a given view of a photo never
changes. For a few views of every photo it is computed once and kept, and the epochs take turns with
the views. Stages that follow one another, see the same views and have a prefix in common share it;
a stage that freezes more runs its further layers on what is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from serving.imaging.preprocess import Preprocess
from training.activations import frozen_prefix
from training.activations.loaders import (
    FROZEN,
    AugmentedPhotos,
    TrainLoader,
    ValidLoader,
    frozen_batch,
    run_frozen,
)
from training.activations.sharing import SharedPrefix
from training.activations.store import CachedViews, DiskStore, Part, Shape
from training.config.schema import Recipe, Stage
from training.models.classifier import Classifier
from training.optim.ema import Ema
from training.pixels.decoded import Photos, PixelSet
from training.pixels.gpu_rows import placed
from training.utils import disk_cache
from training.utils.device import CPU, filled, free
from training.utils.precision import Precision
from training.utils.timer import Timer

MEMORY_BYTES: Final = 2 * 2**30
"""Of what is kept in memory because it can't be kept in the cache."""

ACTIVATIONS_VERSION: Final = 1
"""Version of what is kept. Raise it when a change to augmentation, mixing of views, the frozen
layers' forward pass or the layout of the arrays changes the values; `test_cache_versions.py` fails
until then."""


@dataclass
class ActivationCache:
    """Opens the streams of batches of a run's stages, and keeps what they share.

    room: where it is kept; its budget bounds what is kept in memory, too. say: takes lines for a
    person.
    """

    photos: Photos
    recipe: Recipe
    precision: Precision
    room: disk_cache.DiskCache
    log: Callable[[str], None]
    timer: Timer = field(default_factory=Timer)
    _open: dict[str, CachedViews] = field(default_factory=dict)
    _sets: tuple[PixelSet, PixelSet] | None = None
    _near: tuple[PixelSet, PixelSet] | None = None
    _below: ValidLoader | None = None

    def feeds(
        self,
        classifier: Classifier,
        stage: Stage,
        share: SharedPrefix,
        first_view: int = 0,
        views: int | None = None,
        ema: Ema | None = None,
    ) -> tuple[TrainLoader, ValidLoader]:
        """Open the stage's two streams of batches.

        Args:
            classifier: On the device, frozen for the stage.
            stage, share: What to do.
            first_view: Number of the first view.
            views: How many there are, if that was decided before; else as many as there is room
                for, at most `share.views`.
            ema: Its averages are validated: what an earlier stage trained and this one freezes goes
                on moving among them, and its outputs are not kept.
        """
        classifier.eval()
        preprocess, config = self.recipe.preprocess_of(stage), self.recipe.augment_of(stage)
        with self.timer("decoding"):
            train, valid = self._placed(preprocess)
        layers = [frozen_prefix.fused(part) for part in _parts(classifier, share)]
        frozen = nn.Sequential(*layers)
        draws = AugmentedPhotos(
            train, preprocess, config, self.precision, self.recipe.seed, self.timer
        )
        feed = TrainLoader(draws, frozen, first_view, classes=len(self.photos.dataset.classes))
        if share.why:
            self.log(f"{stage.name:>8}  {share.why}: no views are kept")
        if share.depth:
            self._keep(feed, classifier, stage, share, views, {train.name, valid.name}, layers)
        else:
            self._open = {}
        return feed, self._held_out(classifier, stage, share, valid, layers, ema)

    def _held_out(
        self,
        classifier: Classifier,
        stage: Stage,
        share: SharedPrefix,
        photos: PixelSet,
        layers: list[nn.Module],
        ema: Ema | None,
    ) -> ValidLoader:
        """The validation batches: what is frozen runs once where there is room for its outputs."""
        preprocess = self.recipe.preprocess_of(stage)
        if not share.follows:
            self._below = None
        if ema and not _settled(classifier, ema):
            return ValidLoader(photos, classifier.prefix, preprocess, self.precision, keep=False)
        room = min(MEMORY_BYTES // 2, self.room.budget)
        frozen = nn.Sequential(*layers)
        size = self._shape(frozen, preprocess, len(photos)).size
        feed = ValidLoader(photos, frozen, preprocess, self.precision, bool(share.depth))
        feed.keep = feed.keep and size <= room
        if not (feed.keep and share.with_):
            return feed
        if self._below is None:
            size += self._shape(layers[0], preprocess, len(photos)).size
            if size > room:
                return feed
            self._below = ValidLoader(photos, layers[0], preprocess, self.precision, keep=True)
        if len(layers) == 1:
            return self._below
        feed.prefix, feed.below = layers[1], self._below
        return feed

    def _placed(self, preprocess: Preprocess) -> tuple[PixelSet, PixelSet]:
        """The photos where the device reaches them best, those of another size gone first."""
        sets = self.photos.at(preprocess)
        if self._near is None or sets is not self._sets:
            self._near, self._open, device = None, {}, self.precision.device
            train = placed(sets[0], "training", device, self.log)
            self._near = train, placed(sets[1], "validation", device, self.log)
            self._sets = sets
        return self._near

    def _keep(
        self,
        feed: TrainLoader,
        classifier: Classifier,
        stage: Stage,
        share: SharedPrefix,
        views: int | None,
        pixels: set[str],
        fused: list[nn.Module],
    ) -> None:
        """Have the feed take its batches from kept views, as far as there is room for them."""
        names, shapes = [], []
        inputs = torch.zeros(1, 3, *[feed.draws.preprocess.size] * 2)
        known = _known(feed.draws)
        for part, layers in zip(_parts(classifier, share), fused, strict=True):
            known = hashlib.sha256(known + frozen_prefix.digest(part)).digest()
            names.append(f"activations-{known.hex()[:32]}")
            inputs = self._run(layers, inputs.to(self.precision.device))
            shapes.append(Shape(len(feed.draws.photos), tuple(inputs.shape[1:]), inputs.dtype))
        on_disk = self.precision.device.type == "cpu"
        keep = {*pixels, *names}
        budget = self.room.left(pixels) if on_disk else min(MEMORY_BYTES, self.room.budget)
        a_view = sum(shape.size for shape in shapes)
        fits = min(share.views, budget // max(a_view, 1))
        feed.views = fits if views is None else views
        if not feed.views or fits < feed.views:
            self.log(
                f"{stage.name:>8}  no views are kept: one takes {disk_cache.gigabytes(a_view)}"
            )
            self._open = {}
            return
        where = self._home(a_view * feed.views)
        before, self._open = self._open, {}
        below: CachedViews | None = None
        for name, shape, layers in zip(names, shapes, fused, strict=True):
            make = self._on_photos(feed.draws, layers) if below is None else self._on(below, layers)
            what = f"{self.recipe.arch}, {share.views} views of {shape.photos:,} photos"
            store = DiskStore(self.room, name, what, keep, self.log) if on_disk else None
            below = before.get(name) or CachedViews(shape, make, store, below, where)
            self._open[name] = below
        feed.kept = below
        self.log(f"{stage.name:>8}  {_told(feed.views, share, classifier.freezing.prefix, a_view)}")

    def _home(self, size: int) -> torch.device:
        """Where views are kept that are kept in memory: on a GPU that has room to spare."""
        device = self.precision.device
        return device if device.type == "cuda" and 4 * size <= free(device) else CPU

    def _on_photos(
        self, draws: AugmentedPhotos, layers: nn.Module
    ) -> Callable[[int], Iterator[Part]]:
        def make(number: int) -> Iterator[Part]:
            size = frozen_batch(self.precision.device)
            for index, images in draws(number, torch.arange(len(draws.photos)).split(size)):
                with self.timer(FROZEN):
                    rows = self._run(layers, images)
                yield index, rows

        return make

    def _on(self, below: CachedViews, layers: nn.Module) -> Callable[[int], Iterator[Part]]:
        def make(number: int) -> Iterator[Part]:
            size = frozen_batch(self.precision.device)
            for index in torch.arange(below.shape.photos).split(size):
                with self.timer(FROZEN):
                    inputs = below[number][index].to(self.precision.device)
                    rows = self._run(layers, inputs)
                yield index, rows

        return make

    def _shape(self, layers: nn.Module, preprocess: Preprocess, photos: int) -> Shape:
        device, side = self.precision.device, preprocess.size
        rows = self._run(layers, torch.zeros(1, 3, side, side, device=device))
        if device.type != "cpu":
            photos += -photos % frozen_batch(device)  # those that fill the last batch up
        return Shape(photos, tuple(rows.shape[1:]), rows.dtype)

    def _run(self, layers: nn.Module, inputs: Tensor) -> Tensor:
        """A batch, or less, through frozen layers, which see the size of whole batches."""
        whole = filled(inputs, frozen_batch(self.precision.device))
        return run_frozen(layers, whole, self.precision)[: len(inputs)]


def _parts(classifier: Classifier, share: SharedPrefix) -> list[nn.Sequential]:
    """What is frozen: what other stages share, and what only this one has behind it."""
    whole, cut = classifier.prefix, share.depth
    if not 0 < cut < classifier.freezing.prefix:
        return [whole]
    return [nn.Sequential(*whole[:cut]), nn.Sequential(*whole[cut:])]


def _settled(classifier: Classifier, ema: Ema) -> bool:
    """Whether what is frozen equals its averages."""
    frozen = {id(tensor) for tensor in classifier.prefix.state_dict(keep_vars=True).values()}
    state = classifier.state_dict(keep_vars=True)
    return ema.settled(name for name, value in state.items() if id(value) in frozen)


def _told(views: int, share: SharedPrefix, own: int, size: int) -> str:
    """What is kept, in a line."""
    count = "a view" if views == 1 else f"{views} views"
    short = f" ({share.views} asked for: more don't fit into --cache-gb)"
    more = short if views < share.views else ""
    others = f", shared with {' and '.join(share.with_)}" if share.with_ else ""
    return (
        f"{own} frozen layers run once on {count} of each photo{others}; "
        f"{disk_cache.gigabytes(size)} a view{more}"
    )


def _known(draws: AugmentedPhotos) -> bytes:
    """What decides the inputs of the first layer, view by view."""
    p, dtype = draws.preprocess, draws.precision
    decides = [
        *(
            ACTIVATIONS_VERSION,
            p.size,
            p.crop,
            p.mean,
            p.std,
            draws.config.model_dump(mode="json"),
            draws.seed,
        ),
        *(str(dtype.dtype), str(dtype.device), draws.photos.key.hex()),
    ]
    return hashlib.sha256(repr(decides).encode()).digest()
