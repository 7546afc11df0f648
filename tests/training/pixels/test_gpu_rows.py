"""Rows on a GPU: the same pixels in the same order, and every thread ends.

Most tests run on the CPU, where a "copy" is the tensor itself; the others are marked `gpu`.
"""

import gc
import json
import sys
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serving.errors import WorkError
from training.activations import loaders, stage_loaders
from training.activations.loaders import AugmentedPhotos
from training.activations.sharing import plan_sharing
from training.activations.stage_loaders import StageLoaders
from training.config import load
from training.config.schema import Recipe
from training.config.sections import AugmentConfig
from training.data.dataset import load_dataset
from training.distributed.process_group import SINGLE_PROCESS
from training.engine import finetune, plan
from training.engine.epoch import _backward
from training.evaluation import evaluate
from training.optim.optimizer import build_optimizer, optimizer_step
from training.pixels import gpu_rows
from training.pixels.decoded import DecodedPhotos
from training.pixels.gpu_rows import GpuRows, PrefetchedRows, place_rows, upload_indices
from training.pixels.part import PixelSet
from training.pixels.rows import AHEAD, MemmapRows
from training.report import lr_plots
from training.utils import device, disk_cache
from training.utils.device import CpuCopy, constant, pad_batch, pad_on_gpu, upload
from training.utils.precision import Precision

CPU = torch.device("cpu")
COUNT, SIDE = 23, 12
TWO_SIZES = """
[[stage]]
name = "small"
unfreeze = "all"
lr = 0.01
image_size = 24
[[stage]]
name = "again"
unfreeze = "all"
lr = 0.01
image_size = 24
[[stage]]
name = "large"
unfreeze = "all"
lr = 0.01
"""


def memmap_rows(count=COUNT):
    found = np.random.default_rng(0).integers(0, 256, (2 * count, SIDE, SIDE, 3), dtype=np.uint8)
    return MemmapRows(found, np.random.default_rng(1).permutation(2 * count)[:count])


def order(batch=5):
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))
    return [*shuffled.split(batch), slice(3, 9), slice(20, 30), torch.tensor([4, 4, 0])]


def part(rows, count=COUNT):
    return PixelSet(rows, torch.ones(count), torch.arange(count) % 3, "pixels-x", b"key")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pixels")]


class RecordingRows:
    """Rows that record the thread of each access, and may raise an error at one batch."""

    def __init__(self, rows, fails_at=None):
        self.rows, self.fails_at, self.taken, self.closed = rows, fails_at, [], False

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def batches(self, order):
        try:
            for number, index in enumerate(order):
                if number == self.fails_at:
                    raise WorkError("photo.jpg can't be read any more")
                self.taken.append(threading.current_thread())
                yield self.rows[index]
        finally:
            self.closed = True


@pytest.mark.parametrize("make", [GpuRows, PrefetchedRows])
def test_rows_equal_the_source_rows(make, monkeypatch):
    monkeypatch.setattr(gpu_rows, "CHUNK_BYTES", 4 * 3 * SIDE**2)  # several chunks
    rows = memmap_rows()
    near = make(rows, CPU)
    assert len(near) == len(rows)
    for index in order():
        assert torch.equal(near[index], rows[index])
    for got, index in zip(near.batches(order()), order(), strict=True):
        assert got.dtype == torch.uint8
        assert torch.equal(got, rows[index])
    assert list(near.batches([])) == []
    near[:2].zero_()  # a copy
    assert torch.equal(near[:2], rows[:2])
    assert threads() == []


def test_a_thread_reads_and_copies_ahead():
    class RecordingCopier(CpuCopy):
        def __init__(self):
            self.sent, self.received = [], []

        def send(self, tensor):
            self.sent.append(threading.current_thread())
            return super().send(tensor)

        def receive(self, sent):
            self.received.append(threading.current_thread())
            return super().receive(sent)

    rows, copier = RecordingRows(memmap_rows()), RecordingCopier()
    batches = PrefetchedRows(rows, CPU, copier).batches(order())
    for number in range(1, 4):
        next(batches)
        until = time.monotonic() + 20
        while len(rows.taken) < number + AHEAD and time.monotonic() < until:
            time.sleep(0.01)
        assert len(rows.taken) == number + AHEAD
    assert len(list(batches)) == len(order()) - 3
    assert {*rows.taken, *copier.sent}.isdisjoint({threading.main_thread()})
    assert set(copier.received) == {threading.main_thread()}
    assert rows.closed
    assert threads() == []


def test_an_error_in_the_thread_is_raised_at_its_batch():
    rows = RecordingRows(memmap_rows(), fails_at=3)
    batches = PrefetchedRows(rows, CPU).batches(order())
    for index in order()[:3]:
        assert torch.equal(next(batches), rows[index])
    with pytest.raises(WorkError, match=r"photo\.jpg"):
        next(batches)
    assert rows.closed
    assert threads() == []


def test_closing_early_ends_the_thread():
    rows = RecordingRows(memmap_rows())
    batches = PrefetchedRows(rows, CPU).batches(order())
    next(batches)
    assert threads()
    batches.close()
    assert rows.closed
    assert len(rows.taken) <= 1 + AHEAD
    assert threads() == []
    PrefetchedRows(rows, CPU).batches(order()).close()  # closed before the first batch
    assert threads() == []


def test_rows_that_fit_are_on_the_gpu_and_others_are_copied_ahead(monkeypatch):
    """The meta device replaces the GPU."""
    far, lines, rows = torch.device("meta"), [], memmap_rows()
    size = COUNT * 3 * SIDE**2
    assert place_rows(part(rows), "training", CPU, lines.append).pixels is rows
    assert lines == []
    on_gpu = place_rows(part(rows), "training", far, lines.append, lambda _: 2 * size)
    assert isinstance(on_gpu.pixels, GpuRows)
    assert (on_gpu.name, on_gpu.key) == ("pixels-x", b"key")
    sent = place_rows(part(rows), "training", far, lines.append, lambda _: 2 * size - 2)
    assert isinstance(sent.pixels, PrefetchedRows)
    assert "23 training photos are in GPU memory" in lines[0]
    assert "batch by batch: their" in lines[1]

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_rows, "GpuRows", full)
    assert isinstance(
        place_rows(part(rows), "training", far, lines.append, lambda _: 2**40).pixels,
        PrefetchedRows,
    )
    assert len(lines) == 3


def test_augmented_photos_are_the_same_for_every_row_source(recipe):
    settings = load.read(recipe(), ["preprocess.size=8", "augment.erase=0.5"])
    rows = memmap_rows()
    found = []
    for pixels_of in (rows, GpuRows(rows, CPU), PrefetchedRows(rows, CPU)):
        draws = AugmentedPhotos(
            part(pixels_of), settings.preprocess, settings.augment,
            Precision(torch.float32, CPU), seed=3,
        )  # fmt: skip
        found.append([images for _, images in draws(1, torch.arange(COUNT).split(5))])
    for other in found[1:]:
        for images, same in zip(found[0], other, strict=True):
            assert torch.equal(images, same)


def test_rows_of_one_size_are_placed_once_and_freed_before_the_next(
    recipe, photos, tmp_path, monkeypatch
):
    settings = load.read(recipe(TWO_SIZES))
    old = []

    def on_device(of, name, where, log):
        gc.collect()
        if name == "training":
            assert not [rows for rows in old if rows() is not None]
        near = GpuRows(of.pixels, where)
        old.append(weakref.ref(near))
        return replace(of, pixels=near)

    monkeypatch.setattr("training.activations.stage_loaders.place_rows", on_device)
    decoded = DecodedPhotos(load_dataset(str(photos)), settings.data.presize, str)
    classifier, _ = plan.build_classifier(settings, 3, str)
    activations = StageLoaders(
        decoded, settings, Precision(torch.float32, CPU), disk_cache.DiskCache(tmp_path, 0), str
    )
    for stage, share in zip(
        settings.stage, plan_sharing(classifier, settings, settings.stage), strict=True
    ):
        classifier.freeze_for(stage)
        loader, held_out = activations.loaders(classifier, stage, share)
        assert isinstance(loader.augmented.photos.pixels, GpuRows)
        assert len(list(loader.epoch(0, 16))) == 3
        assert sum(len(labels) for _, labels in held_out) == 9
        del loader, held_out
    assert len(old) == 4


def test_tensors_on_the_cpu_are_not_copied():
    tensor, parts = torch.arange(3), [torch.tensor([1]), slice(0, 2)]
    assert upload(tensor, CPU) is tensor
    assert upload_indices(parts, CPU) == parts
    assert upload_indices(iter([slice(1)]), torch.device("meta")) == [slice(1)]
    assert constant((1, 2.5), CPU) is constant((1, 2.5), CPU)
    with torch.inference_mode():
        assert not constant((7.0,), CPU).is_inference()


def test_a_small_batch_is_padded_in_its_memory_format_on_a_gpu_only():
    batch = torch.rand(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    assert pad_on_gpu(batch, 8) is batch
    assert pad_on_gpu(batch.to("meta"), 8).shape == (8, 4, 5, 6)
    assert pad_batch(batch, 3) is batch
    padded = pad_batch(batch, 8)
    assert torch.equal(padded, torch.cat([batch, torch.zeros(5, 4, 5, 6)]))
    assert padded.is_contiguous(memory_format=torch.channels_last)


THREE_STAGES = """
[[stage]]
name = "head"
lr = 0.01
[[stage]]
name = "tail"
unfreeze = 1
lr = 0.01
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.01
"""


def test_padding_does_not_change_the_metrics(recipe, photos, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(lr_plots, "schedule", lambda *_: None)  # takes longer than the training
    seen, found = set(), []

    def recording(module):
        def pad(batch, size):
            caller = sys._getframe(2).f_code.co_qualname.removesuffix(".<locals>.compute")
            seen.add((module.__name__.rpartition(".")[2], caller.rpartition(".")[2]))
            return pad_batch(batch, size)

        return pad

    for name in ("plain", "pad_on_gpu"):
        if name == "pad_on_gpu":
            for module in (loaders, stage_loaders, evaluate):
                monkeypatch.setattr(module, "pad_on_gpu", recording(module))
        monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / f"{name}-cache"))
        options = ["head.dropout=0", f"weights={weights}"]
        settings = load.read(recipe(THREE_STAGES), options)
        folder = finetune.run(
            settings, str(photos), out=tmp_path / name, device="cpu", cache_gb=0.5, log=str
        )
        rows = (folder / "metrics.csv").read_text().splitlines()[1:]
        best = json.loads((folder / "best.json").read_text())["metrics"]
        found.append([float(v) for row in rows for v in row.split(",")[3:6]] + [best["loss"]])
    # Other batch sizes round differently, and training amplifies the differences.
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    assert {module for module, _ in seen} == {"loaders", "stage_loaders", "evaluate"}, seen
    callers = {caller for module, caller in seen if module == "stage_loaders"}
    assert callers == {"_plan", "_shape", "_from_photos", "_from_views"}, seen


@pytest.mark.filterwarnings(
    "ignore:Synchronization debug mode"
)  # torch warns that the mode is a prototype
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("free", [0, 2**40])
@pytest.mark.parametrize("changes", [(), ("augment.mixup=0.2",), ("stage.all.unfreeze=1",)])
def test_an_epoch_never_synchronises_with_the_gpu(
    where, recipe, photos, tmp_path, monkeypatch, free, changes
):
    settings = load.read(recipe(), ["precision=auto", "augment.erase=0.5", *changes])
    where = torch.device(where)  # on the CPU: the same steps, without the check
    monkeypatch.setattr(
        "training.activations.stage_loaders.place_rows",
        lambda *args: place_rows(*args, lambda _: free),
    )
    decoded = DecodedPhotos(load_dataset(str(photos)), settings.data.presize, str)
    classifier, _ = plan.build_classifier(settings, 3, str)
    precision = Precision(torch.bfloat16, where)
    activations = StageLoaders(
        decoded, settings, precision, disk_cache.DiskCache(tmp_path, 10**9), str
    )
    classifier.to(where).to(memory_format=torch.channels_last)
    (stage,) = settings.stage
    (share,) = plan_sharing(classifier, settings, settings.stage)
    classifier.freeze_for(stage)
    loader, _ = activations.loaders(classifier, stage, share)
    optimizer = build_optimizer(classifier, settings.optimizer, stage, 0.01)
    classifier.train()

    def epoch():
        loader.prepare([0])
        for batch in loader.epoch(0, 8):
            _backward(classifier.suffix, [(batch, len(batch[1]))], precision, 0.1, SINGLE_PROCESS)
            optimizer_step(optimizer, settings.optimizer)

    epoch()  # first-use work: constants, kernels, memory
    on_gpu = where.type == "cuda"
    try:
        torch.cuda.set_sync_debug_mode("error") if on_gpu else None
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default") if on_gpu else None


@pytest.mark.gpu
def test_photos_on_a_gpu_equal_those_on_the_cpu():
    cuda, rows = torch.device("cuda"), memmap_rows()
    for near in (GpuRows(rows, cuda), PrefetchedRows(rows, cuda)):
        for got, index in zip(near.batches(order()), order(), strict=True):
            assert got.device.type == "cuda"
            assert torch.equal(got.cpu(), rows[index])
    assert device.free_memory(cuda) > 0
    preprocess = Recipe(name="x", arch="resnet18", stage=[{"name": "a"}]).preprocess
    found = []
    for where in (CPU, cuda):
        draws = AugmentedPhotos(
            place_rows(part(rows), "training", where, str), replace(preprocess, size=8),
            AugmentConfig(erase=0.5), Precision(torch.float32, where), seed=3,
        )  # fmt: skip
        found.append(torch.cat([i.cpu() for _, i in draws(1, torch.arange(COUNT).split(5))]))
    assert torch.allclose(*found, atol=1e-3)
    assert F.mse_loss(*found) < 1e-8
