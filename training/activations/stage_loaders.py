"""Make the data loaders of every training stage, and cache the outputs of the frozen layers.

An augmented view is a photo after one numbered random augmentation. The outputs of frozen layers
for a view never change. They are computed once for a few views of every photo, and the epochs cycle
through these views. Consecutive stages with the same augmentation share the outputs of the layers
that are frozen in all of them. A stage that freezes more layers computes only these further layers,
from the shared outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, nn

from serving.imaging.preprocess import Preprocess
from training.activations import frozen_prefix
from training.activations.cached_views import (
    TRAILER_BYTES,
    CachedViews,
    ComputeView,
    DiskStore,
    IndexedRows,
    ViewShape,
)
from training.activations.loaders import (
    FROZEN,
    AugmentedPhotos,
    TrainLoader,
    ValidLoader,
    frozen_batch,
    run_frozen,
)
from training.activations.sharing import SharedPrefix
from training.config.schema import Recipe, Stage
from training.models.classifier import Classifier
from training.optim.ema import Ema
from training.pixels.decoded import DecodedPhotos, PixelSet
from training.pixels.gpu_rows import place_rows
from training.utils import disk_cache
from training.utils.console import Log
from training.utils.device import CPU, free_memory, pad_on_gpu
from training.utils.precision import Precision
from training.utils.timer import Timer

MEMORY_BYTES: Final = 2 * 2**30
"""Largest number of bytes of outputs that are kept in memory instead of in the disk cache."""

ACTIVATIONS_VERSION: Final = 2
"""Version number of the cached outputs, in the cache key. Increase it if a change to augmentation,
to the forward pass of the frozen layers or to the layout of the arrays changes the outputs. Without
the increase, `test_cache_versions.py` fails."""


@dataclass(frozen=True)
class CachePlan:
    """Plan of the cached outputs of one stage.

    The frozen layers consist of one or two blocks: the layers shared with other stages, and any
    further frozen layers. Every block has its own cache entry.

    Attributes:
        names: Name of the cache entry of each block.
        shapes: Shape of the outputs of each block for one augmented view of all photos.
        requested: Number of augmented views that the recipe sets.
        views: Number of augmented views that the epochs cycle through; 0: every epoch uses a new
            view.
        cached: Whether the outputs for these views are cached.
    """

    names: tuple[str, ...] = ()
    shapes: tuple[ViewShape, ...] = ()
    requested: int = 0
    views: int = 0
    cached: bool = False

    @property
    def view_bytes(self) -> int:
        """Bytes of the outputs of all blocks for one augmented view of all photos."""
        return sum(shape.size + TRAILER_BYTES for shape in self.shapes)


def plan_views(
    names: Sequence[str],
    shapes: Sequence[ViewShape],
    requested: int,
    budget: int,
    fixed: int | None = None,
) -> CachePlan:
    """Plan to cache as many of the `requested` augmented views as fit into `budget`.

    Args:
        names, shapes: Name of the cache entry and shape of the outputs of each block; see
            `CachePlan`.
        requested: Number of views that the recipe sets.
        budget: Size limit in bytes.
        fixed: Number of views that another process, or the run before it was interrupted, has
            chosen. If this number does not fit into `budget`, no view is cached. None: choose here.
    """
    plan = CachePlan(tuple(names), tuple(shapes), requested)
    fitting = min(requested, budget // max(plan.view_bytes, 1))
    views = fitting if fixed is None else fixed
    return replace(plan, views=views, cached=0 < views <= fitting)


@dataclass
class StageLoaders:
    """Makes the data loaders of all stages of a run, and caches the outputs of frozen layers.

    Attributes:
        photos: The decoded photos.
        recipe: The recipe of the run.
        precision: Device and dtype.
        cache: The disk cache. Its size limit also applies to outputs in memory.
        log: Function that writes a log line.
        timer: Timer of decoding, augmentation and the frozen layers.
    """

    photos: DecodedPhotos
    recipe: Recipe
    precision: Precision
    cache: disk_cache.DiskCache
    log: Log
    timer: Timer = field(default_factory=Timer)
    _views: dict[str, CachedViews] = field(default_factory=dict)
    _pixel_sets: tuple[PixelSet, PixelSet] | None = None
    _placed_sets: tuple[PixelSet, PixelSet] | None = None
    _shared_valid: ValidLoader | None = None

    def loaders(
        self,
        classifier: Classifier,
        stage: Stage,
        share: SharedPrefix,
        first_view: int = 0,
        views: int | None = None,
        ema: Ema | None = None,
    ) -> tuple[TrainLoader, ValidLoader]:
        """Make the training loader and the validation loader of a stage.

        Args:
            classifier: The network, on the training device and frozen for the stage.
            stage: The stage.
            share: The frozen layers that the stage shares with other stages.
            first_view: Number of the augmented view of the first epoch.
            views: Number of augmented views that another process, or the run before it was
                interrupted, has chosen. None: as many as the cache can store, up to `share.views`.
            ema: Moving averages of the weights. Validation uses the averages instead of the
                weights. If the averages of frozen layers differ from their weights (an earlier
                stage trained these layers), the validation loader caches nothing.
        """
        classifier.eval()
        preprocess, config = self.recipe.preprocess_of(stage), self.recipe.augment_of(stage)
        with self.timer("decoding"):
            train, valid = self._place(preprocess)
        parts = _frozen_parts(classifier, share)
        layers = [frozen_prefix.fused(part) for part in parts]
        augmented = AugmentedPhotos(
            train, preprocess, config, self.precision, self.recipe.seed, self.timer
        )
        if share.reason:
            self.log(f"{stage.name:>8}  {share.reason}: no views are cached")
        protected = {train.name, valid.name}
        plan = CachePlan()
        if share.depth:
            plan = self._plan(augmented, parts, layers, share, views, protected)
            self.log(f"{stage.name:>8}  {_summary(plan, share, classifier.freezing.prefix)}")
        train_loader = TrainLoader(
            augmented,
            nn.Sequential(*layers),
            first_view,
            plan.views,
            len(self.photos.dataset.classes),
            self._open_views(plan, augmented, layers, protected),
        )
        return train_loader, self._valid_loader(classifier, share, preprocess, valid, layers, ema)

    def _valid_loader(
        self,
        classifier: Classifier,
        share: SharedPrefix,
        preprocess: Preprocess,
        photos: PixelSet,
        layers: list[nn.Module],
        ema: Ema | None,
    ) -> ValidLoader:
        """Make the validation loader. The frozen layers run once if the outputs fit in memory."""
        if share.is_first:
            self._shared_valid = None
        if ema and not _equals_average(classifier, ema):
            return ValidLoader(photos, classifier.prefix, preprocess, self.precision, False)
        budget = min(MEMORY_BYTES // 2, self.cache.budget)
        prefix = nn.Sequential(*layers)
        size = self._shape(prefix, preprocess, len(photos)).size
        fits = bool(share.depth) and size <= budget
        loader = ValidLoader(photos, prefix, preprocess, self.precision, fits)
        if not (fits and share.shared_with):
            return loader
        if self._shared_valid is None:
            size += self._shape(layers[0], preprocess, len(photos)).size
            if size > budget:
                return loader
            self._shared_valid = ValidLoader(photos, layers[0], preprocess, self.precision, True)
        if len(layers) == 1:
            return self._shared_valid
        loader.prefix, loader.source = layers[1], self._shared_valid
        return loader

    def _place(self, preprocess: Preprocess) -> tuple[PixelSet, PixelSet]:
        """Return the training and validation photos for `preprocess`, on the training device.

        Photos that were decoded for another `preprocess` are freed first.
        """
        sets = self.photos.pixel_sets(preprocess)
        if self._placed_sets is None or sets is not self._pixel_sets:
            self._placed_sets, self._views, device = None, {}, self.precision.device
            train = place_rows(sets[0], "training", device, self.log)
            self._placed_sets = train, place_rows(sets[1], "validation", device, self.log)
            self._pixel_sets = sets
        return self._placed_sets

    @property
    def _on_disk(self) -> bool:
        """Whether outputs are stored on disk (on a CPU) or kept in memory (on a GPU)."""
        return self.precision.device.type == "cpu"

    def _plan(
        self,
        augmented: AugmentedPhotos,
        parts: list[nn.Sequential],
        layers: list[nn.Module],
        share: SharedPrefix,
        views: int | None,
        protected: set[str],
    ) -> CachePlan:
        names, shapes = [], []
        inputs = torch.zeros(1, 3, *[augmented.preprocess.size] * 2)
        key = _input_key(augmented)
        for part, layer in zip(parts, layers, strict=True):
            key = hashlib.sha256(key + frozen_prefix.digest(part)).digest()
            names.append(f"activations-{key.hex()[:32]}")
            inputs = self._run(layer, inputs.to(self.precision.device))
            shapes.append(ViewShape(len(augmented.photos), tuple(inputs.shape[1:]), inputs.dtype))
        budget = self.cache.budget
        budget = self.cache.available(protected) if self._on_disk else min(MEMORY_BYTES, budget)
        return plan_views(names, shapes, share.views, budget, views)

    def _open_views(
        self,
        plan: CachePlan,
        augmented: AugmentedPhotos,
        layers: list[nn.Module],
        protected: set[str],
    ) -> CachedViews | None:
        """Open the cached outputs of the last block of frozen layers; None if nothing is cached.

        Outputs that the previous stage opened are reused.
        """
        before, self._views = self._views, {}
        if not plan.cached:
            return None
        device = self._memory_device(plan.view_bytes * plan.views)
        views: CachedViews | None = None
        for name, shape, layer in zip(plan.names, plan.shapes, layers, strict=True):
            compute = (
                self._from_photos(augmented, layer)
                if views is None
                else self._from_views(views, layer)
            )
            store = None
            if self._on_disk:
                what = f"{self.recipe.arch}, {plan.requested} views of {shape.photos:,} photos"
                store = DiskStore(self.cache, name, what, {*protected, *plan.names}, self.log)
            views = before.get(name) or CachedViews(shape, compute, store, views, device)
            self._views[name] = views
        return views

    def _memory_device(self, size: int) -> torch.device:
        """Return the GPU if `size` is at most 1/4 of the free GPU memory, else the CPU."""
        device = self.precision.device
        return device if device.type == "cuda" and 4 * size <= free_memory(device) else CPU

    def _from_photos(self, augmented: AugmentedPhotos, layers: nn.Module) -> ComputeView:
        def compute(number: int) -> Iterator[IndexedRows]:
            size = frozen_batch(self.precision.device)
            parts = torch.arange(len(augmented.photos)).split(size)
            for index, images in augmented(number, parts):
                with self.timer(FROZEN):
                    rows = self._run(layers, images)
                yield index, rows

        return compute

    def _from_views(self, source: CachedViews, layers: nn.Module) -> ComputeView:
        def compute(number: int) -> Iterator[IndexedRows]:
            size = frozen_batch(self.precision.device)
            for index in torch.arange(source.shape.photos).split(size):
                with self.timer(FROZEN):
                    inputs = source[number][index].to(self.precision.device)
                    rows = self._run(layers, inputs)
                yield index, rows

        return compute

    def _shape(self, layers: nn.Module, preprocess: Preprocess, photos: int) -> ViewShape:
        """Return shape and dtype of the outputs of `layers` for `photos` validation photos."""
        device, side = self.precision.device, preprocess.size
        rows = self._run(layers, torch.zeros(1, 3, side, side, device=device))
        if device.type != "cpu":
            photos += -photos % frozen_batch(device)  # padding of the last batch
        return ViewShape(photos, tuple(rows.shape[1:]), rows.dtype)

    def _run(self, layers: nn.Module, inputs: Tensor) -> Tensor:
        """Run frozen layers on a batch. On a GPU, an incomplete batch is padded for the run."""
        batch = pad_on_gpu(inputs, frozen_batch(self.precision.device))
        return run_frozen(layers, batch, self.precision)[: len(inputs)]


def _frozen_parts(classifier: Classifier, share: SharedPrefix) -> list[nn.Sequential]:
    """Split the frozen layers: the layers shared with other stages, then the rest, if any."""
    prefix, depth = classifier.prefix, share.depth
    if not 0 < depth < classifier.freezing.prefix:
        return [prefix]
    return [nn.Sequential(*prefix[:depth]), nn.Sequential(*prefix[depth:])]


def _equals_average(classifier: Classifier, ema: Ema) -> bool:
    """Whether the frozen weights equal their moving averages."""
    frozen = {id(tensor) for tensor in classifier.prefix.state_dict(keep_vars=True).values()}
    state = classifier.state_dict(keep_vars=True)
    return ema.equal_weights(name for name, value in state.items() if id(value) in frozen)


def _summary(plan: CachePlan, share: SharedPrefix, layers: int) -> str:
    """Return the log line of a plan. layers: number of frozen layers."""
    size = disk_cache.format_size(plan.view_bytes)
    if not plan.cached:
        return f"no views are cached: one takes {size}"
    count = "1 view" if plan.views == 1 else f"{plan.views} views"
    reduced = f" (of {plan.requested}: more don't fit into --cache-gb)"
    note = reduced if plan.views < plan.requested else ""
    others = f", shared with {' and '.join(share.shared_with)}" if share.shared_with else ""
    return f"{layers} frozen layers run once on {count} of each photo{others}; {size} a view{note}"


def _input_key(augmented: AugmentedPhotos) -> bytes:
    """Hash everything that determines the augmented photos of a view, except the view's number."""
    p, precision = augmented.preprocess, augmented.precision
    inputs = [
        ACTIVATIONS_VERSION,
        *(p.size, p.kept_share, p.mean, p.std),
        augmented.config.model_dump(mode="json"),
        augmented.seed,
        *(str(precision.dtype), str(precision.device), augmented.photos.key.hex()),
    ]
    return hashlib.sha256(repr(inputs).encode()).digest()
