"""Rows on their way to a GPU: the same pixels in the same order, and no thread left behind.

The CPU stands in for the GPU: its "copies" are the tensors themselves. What only a GPU can show is
marked so.
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
from training.activations import cache as activations
from training.activations import loaders as feeds
from training.activations.cache import ActivationCache
from training.activations.loaders import AugmentedPhotos
from training.activations.sharing import shares
from training.config import load as config
from training.config.sections import AugmentConfig
from training.data.dataset import load_dataset
from training.distributed.process_group import SINGLE_PROCESS
from training.engine import finetune as fine_tune
from training.engine import plan
from training.engine.epoch import _backward
from training.evaluation import evaluate
from training.optim import optimizer as optim
from training.pixels import decoded as pixels
from training.pixels import gpu_rows as device_rows
from training.pixels.gpu_rows import GpuRows, PrefetchedRows, moved, placed
from training.pixels.part import PixelSet
from training.pixels.rows import AHEAD, MemmapRows
from training.utils import device, disk_cache
from training.utils.device import CpuCopy, constant, fill_up, filled, upload
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


def mapped(count=COUNT):
    found = np.random.default_rng(0).integers(0, 256, (2 * count, SIDE, SIDE, 3), dtype=np.uint8)
    return MemmapRows(found, np.random.default_rng(1).permutation(2 * count)[:count])


def order(batch=5):
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))
    return [*shuffled.split(batch), slice(3, 9), slice(20, 30), torch.tensor([4, 4, 0])]


def part(rows, count=COUNT):
    return PixelSet(rows, torch.ones(count), torch.arange(count) % 3, "pixels-x", b"key")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pixels")]


class Noted:
    """Rows that note what is asked of them, and may break at one batch."""

    def __init__(self, rows, breaks=None):
        self.rows, self.breaks, self.taken, self.closed = rows, breaks, [], False

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def batches(self, order):
        try:
            for number, index in enumerate(order):
                if number == self.breaks:
                    raise WorkError("photo.jpg can't be read any more")
                self.taken.append(threading.current_thread())
                yield self.rows[index]
        finally:
            self.closed = True


@pytest.mark.parametrize("make", [GpuRows, PrefetchedRows])
def test_rows_are_those_that_were_given(make, monkeypatch):
    monkeypatch.setattr(device_rows, "CHUNK", 4 * 3 * SIDE**2)  # several pieces
    rows = mapped()
    near = make(rows, CPU)
    assert len(near) == len(rows)
    for index in order():
        assert torch.equal(near[index], rows[index])
    for got, index in zip(near.batches(order()), order(), strict=True):
        assert got.dtype == torch.uint8
        assert torch.equal(got, rows[index])
    assert list(near.batches([])) == []
    near[:2].zero_()  # the caller's own
    assert torch.equal(near[:2], rows[:2])
    assert threads() == []


def test_a_thread_of_its_own_works_ahead():
    class Lane(CpuCopy):
        def __init__(self):
            self.sent, self.received = [], []

        def send(self, tensor):
            self.sent.append(threading.current_thread())
            return super().send(tensor)

        def receive(self, sent):
            self.received.append(threading.current_thread())
            return super().receive(sent)

    rows, lane = Noted(mapped()), Lane()
    batches = PrefetchedRows(rows, CPU, lane).batches(order())
    for number in range(1, 4):
        next(batches)
        until = time.monotonic() + 20
        while len(rows.taken) < number + AHEAD and time.monotonic() < until:
            time.sleep(0.01)
        assert len(rows.taken) == number + AHEAD
    assert len(list(batches)) == len(order()) - 3
    assert {*rows.taken, *lane.sent}.isdisjoint({threading.main_thread()})
    assert set(lane.received) == {threading.main_thread()}
    assert rows.closed
    assert threads() == []


def test_an_error_in_the_thread_comes_out_where_it_belongs():
    rows = Noted(mapped(), breaks=3)
    batches = PrefetchedRows(rows, CPU).batches(order())
    for index in order()[:3]:
        assert torch.equal(next(batches), rows[index])
    with pytest.raises(WorkError, match=r"photo\.jpg"):
        next(batches)
    assert rows.closed
    assert threads() == []


def test_closing_early_ends_the_thread():
    rows = Noted(mapped())
    batches = PrefetchedRows(rows, CPU).batches(order())
    next(batches)
    assert threads()
    batches.close()
    assert rows.closed
    assert len(rows.taken) <= 1 + AHEAD
    assert threads() == []
    PrefetchedRows(rows, CPU).batches(order()).close()  # never begun
    assert threads() == []


def test_rows_that_fit_lie_on_the_device_and_others_are_copied_ahead(monkeypatch):
    """torch's device without memory stands in for a GPU."""
    far, lines, rows = torch.device("meta"), [], mapped()
    size = COUNT * 3 * SIDE**2
    assert placed(part(rows), "training", CPU, lines.append).pixels is rows
    assert lines == []
    kept = placed(part(rows), "training", far, lines.append, lambda _: 2 * size)
    assert isinstance(kept.pixels, GpuRows)
    assert (kept.name, kept.key) == ("pixels-x", b"key")
    sent = placed(part(rows), "training", far, lines.append, lambda _: 2 * size - 2)
    assert isinstance(sent.pixels, PrefetchedRows)
    assert "23 training photos lie on the GPU" in lines[0]
    assert "batch by batch: their" in lines[1]

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device_rows, "Resident", full)
    assert isinstance(
        placed(part(rows), "training", far, lines.append, lambda _: 2**40).pixels, PrefetchedRows
    )
    assert len(lines) == 3


def test_augmented_photos_are_the_same_wherever_rows_lie(recipe):
    settings = config.read(recipe(), ["preprocess.size=8", "augment.erase=0.5"])
    rows = mapped()
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


def test_rows_of_one_size_are_placed_once_and_go_before_the_next(
    recipe, photos, tmp_path, monkeypatch
):
    settings = config.read(recipe(TWO_SIZES))
    old = []

    def on_device(of, name, where, log):
        gc.collect()
        if name == "training":
            assert not [rows for rows in old if rows() is not None]
        near = GpuRows(of.pixels, where)
        old.append(weakref.ref(near))
        return replace(of, pixels=near)

    monkeypatch.setattr("training.activations.cache.placed", on_device)
    decoded = pixels.Photos(load_dataset(str(photos)), settings.data.presize, str)
    classifier, _ = plan.build_classifier(settings, 3, str)
    activations = ActivationCache(
        decoded, settings, Precision(torch.float32, CPU), disk_cache.DiskCache(tmp_path, 0), str
    )
    for stage, share in zip(
        settings.stage, shares(classifier, settings, settings.stage), strict=True
    ):
        classifier.freeze_for(stage)
        feed, held_out = activations.feeds(classifier, stage, share)
        assert isinstance(feed.draws.photos.pixels, GpuRows)
        assert len(list(feed.epoch(0, 16))) == 3
        assert sum(len(labels) for _, labels in held_out) == 9
        del feed, held_out
    assert len(old) == 4


def test_what_is_on_the_cpu_is_not_copied_there():
    tensor, parts = torch.arange(3), [torch.tensor([1]), slice(0, 2)]
    assert upload(tensor, CPU) is tensor
    assert moved(parts, CPU) == parts
    assert moved(iter([slice(1)]), torch.device("meta")) == [slice(1)]
    assert constant((1, 2.5), CPU) is constant((1, 2.5), CPU)
    with torch.inference_mode():
        assert not constant((7.0,), CPU).is_inference()


def test_a_small_batch_is_filled_up_in_its_own_layout_on_a_gpu_alone():
    batch = torch.rand(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    assert filled(batch, 8) is batch
    assert filled(batch.to("meta"), 8).shape == (8, 4, 5, 6)
    assert fill_up(batch, 3) is batch
    whole = fill_up(batch, 8)
    assert torch.equal(whole, torch.cat([batch, torch.zeros(5, 4, 5, 6)]))
    assert whole.is_contiguous(memory_format=torch.channels_last)


WHOLE = '[[stage]]\nname = "all"\nunfreeze = "all"\nlr = 0.01\n'


def test_filling_up_changes_no_figure(recipe, photos, weights, two_stages, tmp_path, monkeypatch):
    seen, found = set(), []

    def watched(room):
        def fill(batch, size):
            caller = sys._getframe(2).f_code.co_qualname.removesuffix(".<locals>.make")
            seen.add((room.__name__.rpartition(".")[2], caller.rpartition(".")[2]))
            return fill_up(batch, size)

        return fill

    for name in ("plain", "filled"):
        if name == "filled":
            for room in (feeds, activations, evaluate):
                monkeypatch.setattr(room, "filled", watched(room))
        monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / f"{name}-cache"))
        options = ["head.dropout=0", f"weights={weights}"]
        settings = config.read(recipe(two_stages + WHOLE), options)
        folder = fine_tune.run(
            settings, str(photos), out=tmp_path / name, device="cpu", cache_gb=0.5, log=str
        )
        rows = (folder / "metrics.csv").read_text().splitlines()[1:]
        best = json.loads((folder / "best.json").read_text())["metrics"]
        found.append([float(v) for row in rows for v in row.split(",")[3:6]] + [best["loss"]])
    # Other batch sizes round in other ways, and training goes on from there.
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    where = {room for room, _ in seen}
    assert where == {"feeds", "activations", "evaluate"}, seen
    callers = {caller for room, caller in seen if room == "activations"}
    assert callers == {"_keep", "_shape", "_on_photos", "_on"}, seen


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch's, of its own tool
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("free", [0, 2**40])
@pytest.mark.parametrize("changes", [(), ("augment.mixup=0.2",), ("stage.all.unfreeze=1",)])
def test_nothing_in_an_epoch_waits_for_the_gpu(
    where, recipe, photos, tmp_path, monkeypatch, free, changes
):
    settings = config.read(recipe(), ["precision=auto", "augment.erase=0.5", *changes])
    where = torch.device(where)  # on the CPU the same steps, with nothing to wait for
    monkeypatch.setattr(
        "training.activations.cache.placed", lambda *args: placed(*args, lambda _: free)
    )
    decoded = pixels.Photos(load_dataset(str(photos)), settings.data.presize, str)
    classifier, _ = plan.build_classifier(settings, 3, str)
    precision = Precision(torch.bfloat16, where)
    activations = ActivationCache(
        decoded, settings, precision, disk_cache.DiskCache(tmp_path, 10**9), str
    )
    classifier.to(where).to(memory_format=torch.channels_last)
    (stage,) = settings.stage
    (share,) = shares(classifier, settings, settings.stage)
    classifier.freeze_for(stage)
    feed, _ = activations.feeds(classifier, stage, share)
    optimizer = optim.build(classifier, settings.optimizer, stage, 0.01)
    classifier.train()

    def epoch():
        feed.prepare([0])
        for batch in feed.epoch(0, 8):
            _backward(classifier.suffix, [(batch, len(batch[1]))], precision, 0.1, SINGLE_PROCESS)
            optim.step(optimizer, settings.optimizer)

    epoch()  # what is made once: constants, kernels, memory
    on_gpu = where.type == "cuda"
    try:
        torch.cuda.set_sync_debug_mode("error") if on_gpu else None
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default") if on_gpu else None


@pytest.mark.gpu
def test_a_gpu_sees_the_photos_that_the_cpu_sees():
    cuda, rows = torch.device("cuda"), mapped()
    for near in (GpuRows(rows, cuda), PrefetchedRows(rows, cuda)):
        for got, index in zip(near.batches(order()), order(), strict=True):
            assert got.device.type == "cuda"
            assert torch.equal(got.cpu(), rows[index])
    assert device.free(cuda) > 0
    preprocess = config.Recipe(name="x", arch="resnet18", stage=[{"name": "a"}]).preprocess
    found = []
    for where in (CPU, cuda):
        draws = AugmentedPhotos(
            placed(part(rows), "training", where, str), replace(preprocess, size=8),
            AugmentConfig(erase=0.5), Precision(torch.float32, where), seed=3,
        )  # fmt: skip
        found.append(torch.cat([i.cpu() for _, i in draws(1, torch.arange(COUNT).split(5))]))
    assert torch.allclose(*found, atol=1e-3)
    assert F.mse_loss(*found) < 1e-8
