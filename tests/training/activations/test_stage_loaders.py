"""Cached outputs of frozen layers: exact, shared by stages and runs, never stale or incomplete."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tests.training.conftest import small_network
from training.activations import frozen_prefix
from training.activations.cached_views import TRAILER_BYTES, CachedViews, DiskStore, ViewShape
from training.activations.loaders import AugmentedPhotos, TrainLoader, ValidLoader
from training.activations.sharing import SharedPrefix, plan_sharing
from training.activations.stage_loaders import StageLoaders
from training.config import load
from training.data.dataset import load_dataset
from training.engine import plan
from training.models.classifier import normalise
from training.optim.ema import Ema
from training.pixels.decoded import DecodedPhotos
from training.utils import disk_cache
from training.utils.precision import Precision

CPU = Precision(torch.float32, torch.device("cpu"))


@pytest.fixture
def lines():
    return []


@pytest.fixture
def cache(tmp_path):
    return disk_cache.DiskCache(tmp_path / "cache", 10**9)


@pytest.fixture
def open_run(recipe, photos, lines, cache, two_stages):
    """Makes the activation cache of a run as `fledge train` does."""

    def opened(*overrides, stages=two_stages, there=cache, precision=CPU):
        settings = load.read(recipe(stages), overrides)
        decoded = DecodedPhotos(load_dataset(str(photos)), settings.data.presize, lines.append)
        classifier, _ = plan.build_classifier(settings, 3, lines.append)
        activations = StageLoaders(decoded, settings, precision, there, lines.append)
        return settings, classifier, activations

    return opened


def open_loaders(opened, stage=0, **given):
    settings, classifier, activations = opened
    found = plan_sharing(classifier, settings, settings.stage)
    classifier.freeze_for(settings.stage[stage])
    return activations.loaders(classifier, settings.stage[stage], found[stage], **given)


def rows(loader, epoch=0):
    return torch.cat([inputs for inputs, _ in loader.epoch(epoch, 8)])


def entries(cache):
    return {entry.path.name for entry in cache.entries() if entry.path.name.startswith("act")}


def small_resnet():
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    return nn.Sequential(*list(network.children())[:-2])


def small_densenet():
    return torchvision.models.DenseNet(8, (2, 2), num_init_features=16).features


BODIES = {
    "resnet": small_resnet,
    "mobilenet_v2": lambda: small_network().features,
    "densenet": small_densenet,
    "squeezenet": lambda: torchvision.models.squeezenet1_1().features,  # no BatchNorm
}


@pytest.mark.parametrize("family", BODIES)
def test_fusing_changes_rounding_only(family):
    torch.manual_seed(0)
    body = BODIES[family]()
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    body = body.eval()
    images = torch.randn(2, 3, 64, 64)
    folded = frozen_prefix.fused(body)
    with torch.no_grad():
        expected, got = body(images), folded(images)
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()
    before, after = (
        sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        for network in (body, folded)
    )
    assert after < max(1, before)


class ConvsAndActivations(nn.Module):
    """Four convolutions that can be joined with their activations, and two that can't."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, groups=g) for g in (1, 4, 1, 2)])
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU6(True), nn.Hardswish(), nn.SiLU()])
        self.norm = nn.BatchNorm2d(4)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(4, 4, 3, stride=2, bias=False)

    def forward(self, x):
        for conv, act in zip(self.convs, self.acts, strict=True):
            x = act(conv(x * 3))
        x = self.acts[0](self.mirrored(self.norm(x)))
        raw = self.twice(x)
        return self.acts[0](raw) + raw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_activations_are_joined_with_the_convolutions_before_them(dtype, layout):
    torch.manual_seed(0)
    network = ConvsAndActivations().eval()
    images = torch.randn(3, 4, 9, 9).contiguous(memory_format=layout)
    folded = frozen_prefix.fused(network)
    joined = [m for m in folded.modules() if isinstance(m, frozen_prefix.ConvActivation)]
    assert [m.kind for m in joined] == ["relu", "hardtanh", "hardswish", "swish"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        expected, got = network(images), folded(images)
    assert got.dtype == expected.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 3e-2
    assert (expected - got).abs().max() <= near * expected.abs().max()
    assert expected.abs().max() > 0.1


def test_without_onednn_activations_are_not_joined(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    folded = frozen_prefix.fused(ConvsAndActivations().eval())
    assert not any(isinstance(m, frozen_prefix.ConvActivation) for m in folded.modules())


def test_a_network_that_can_not_be_traced_is_not_fused():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    network = nn.Sequential(nn.BatchNorm2d(3), Odd()).eval()
    assert frozen_prefix.fused(network) is network


def test_cached_views_give_the_losses_of_running_the_frozen_layers(open_run):
    """Losses are in float32, with one view per epoch; the relative tolerance is 1e-4."""
    loader, _ = open_loaders(open_run("head.dropout=0"), stage=1)
    _, classifier, _ = opened = open_run("head.dropout=0")
    live, _ = open_loaders(opened, stage=1, views=0)
    live.cached, live.prefix = None, classifier.prefix
    assert loader.cached
    assert loader.views == 3
    for epoch in range(3):
        for (a, same), (b, labels) in zip(
            loader.epoch(epoch, 8), live.epoch(epoch, 8), strict=True
        ):
            assert torch.equal(labels, same)
            with torch.no_grad():
                losses = [F.cross_entropy(classifier.suffix(x), labels) for x in (a, b)]
            assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    assert torch.equal(rows(loader), rows(loader))
    assert not torch.allclose(rows(loader, 0), rows(loader, 1))


def test_stages_share_the_prefix_they_have_in_common(open_run):
    settings, classifier, _ = opened = open_run()
    found = plan_sharing(classifier, settings, settings.stage)
    depth = found[1].depth
    assert 0 < depth < len(classifier.body)
    assert found == [
        SharedPrefix(depth, 3, is_last=False, shared_with=("tail",)),
        SharedPrefix(depth, 3, is_first=False, shared_with=("head",)),
    ]
    head, _ = open_loaders(opened)
    assert rows(head).shape == (36, 2 * 1280)
    shared = head.cached.source
    tail, _ = open_loaders(opened, stage=1)
    assert tail.cached is shared  # computed by the head stage
    assert list(shared._views) == [0]


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ((), 1),
        (("stage.tail.image_size=24",), 2),
        (("stage.tail.augment.max_rotate=3",), 2),
        (("stage.tail.unfreeze=all",), 1),
        (("stage.tail.augment.mixup=0.2",), 1),
        (("stage.tail.frozen_batchnorm=stats",), 1),
        (("stage.tail.views=0",), 1),
        (("stage.tail.views=0", "stage.head.views=0"), 0),
    ],
)
def test_stages_with_other_pictures_or_views_do_not_share(open_run, changes, groups):
    settings, classifier, _ = open_run(*changes)
    found = plan_sharing(classifier, settings, settings.stage)
    assert sum(share.is_last for share in found if share.depth) == groups
    if groups != 1 or changes:
        assert all(share.is_first and share.is_last and not share.shared_with for share in found)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("stage.tail.augment.cutmix=1", "mixup and cutmix"),
        ("stage.tail.frozen_batchnorm=stats", "BatchNorms change"),
    ],
)
def test_a_stage_that_caches_nothing_logs_the_reason(open_run, lines, change, why):
    loader, _ = open_loaders(open_run(change), stage=1)
    assert loader.cached is None
    assert [line for line in lines if "no views are cached" in line and why in line]


def test_another_run_reads_the_cached_views(open_run, cache, monkeypatch):
    first, _ = open_loaders(open_run(), stage=1)
    expected = [rows(first, epoch) for epoch in range(3)]
    second, _ = open_loaders(open_run(), stage=1)
    monkeypatch.setattr(
        "training.augmentation.transforms.apply", lambda *_: pytest.fail("computed again")
    )
    assert all(torch.equal(rows(second, epoch), expected[epoch]) for epoch in range(3))
    assert len(entries(cache)) == 1


@pytest.mark.parametrize(
    "change",
    [
        "seed=5",
        "augment.max_rotate=20",
        "augment.crop=center",
        "data.presize=1.25",
        "weights",
        "photo",
    ],
)
def test_changed_inputs_are_computed_again(open_run, cache, photos, weights, change):
    trained = torch.load(weights)
    torch.save({name: value * 2 for name, value in trained.items()}, weights)
    first, _ = open_loaders(open_run("augment.max_rotate=5"), stage=1)
    before = rows(first)
    if change == "photo":
        (photos / "blue" / "0.jpg").write_bytes((photos / "red" / "3.jpg").read_bytes())
    overrides = {"weights": (f"weights={weights}",), "photo": ()}.get(change, (change,))
    second, _ = open_loaders(open_run("augment.max_rotate=5", *overrides), stage=1)
    assert not torch.equal(before, rows(second))
    assert len(entries(cache)) == 2


def test_the_number_of_views_is_limited_by_the_budget(open_run, tmp_path, lines):
    loader, _ = open_loaders(open_run(), stage=1)
    a_view = loader.cached.shape.size + TRAILER_BYTES
    for number, (budget, views) in enumerate(
        [(10 * a_view, 3), (2.5 * a_view, 2), (0.5 * a_view, 0), (0, 0)]
    ):
        there = disk_cache.DiskCache(tmp_path / str(number), int(budget))
        loader, _ = open_loaders(open_run(there=there), stage=1)
        assert loader.views == views
        assert bool(loader.cached) == bool(views)
        for epoch in range(3):
            rows(loader, epoch)
        assert there.size() == views * a_view
        assert not torch.equal(rows(loader, 0), rows(loader, 1))
    assert [line for line in lines if "2 views of each photo" in line and "of 3: more" in line]
    assert [line for line in lines if "no views are cached" in line]


def test_views_of_other_runs_are_evicted_before_the_pixels(open_run, tmp_path):
    there = disk_cache.DiskCache(tmp_path / "small", 10**9)
    loader, _ = open_loaders(open_run(there=there), stage=1)
    rows(loader)
    there = disk_cache.DiskCache(there.folder, there.size())
    other, _ = open_loaders(
        open_run("seed=3", "stage.tail.views=1", "stage.head.views=0", there=there), stage=1
    )
    rows(other)
    assert there.size() <= there.budget
    assert len(entries(there)) == 1


def test_with_an_unusable_cache_views_are_kept_in_memory(open_run, tmp_path, lines):
    (tmp_path / "file").write_text("")
    there = disk_cache.DiskCache(tmp_path / "file" / "cache", 10**9)
    loader, _ = open_loaders(open_run(there=there), stage=1)
    expected, _ = open_loaders(open_run(), stage=1)
    assert torch.equal(rows(loader), rows(expected))
    assert [line for line in lines if "can't be used" in line]


def test_a_resumed_run_has_the_same_number_of_views(open_run, tmp_path):
    small = disk_cache.DiskCache(tmp_path / "small", 0)
    loader, _ = open_loaders(open_run(there=small), stage=1, views=2)
    enough, _ = open_loaders(open_run(), stage=1, views=2)
    assert (loader.views, enough.views) == (2, 2)
    for epoch in range(3):
        assert torch.allclose(rows(loader, epoch), rows(enough, epoch), rtol=1e-4, atol=1e-5)
    assert torch.equal(rows(enough, 0).sort(0)[0], rows(enough, 2).sort(0)[0])


def test_frozen_layers_with_other_averages_are_not_cached_for_validation(open_run):
    settings, classifier, activations = open_run()
    share = plan_sharing(classifier, settings, settings.stage)[0]
    classifier.freeze_for(settings.stage[0])
    ema = Ema(classifier, 0.9)
    _, held_out = activations.loaders(classifier, settings.stage[0], share, ema=ema)
    assert held_out.cache_outputs
    ema.averages["body.0.0.weight"] += 1
    _, held_out = activations.loaders(classifier, settings.stage[0], share, ema=ema)
    assert not held_out.cache_outputs
    before = torch.cat([inputs for inputs, _ in held_out])
    with ema.swapped():
        assert not torch.allclose(before, torch.cat([inputs for inputs, _ in held_out]))


def test_validation_photos_are_preprocessed_as_in_serving(open_run, photos):
    settings, _, activations = open_run()
    _, valid = activations.photos.pixel_sets(settings.preprocess)
    for keep in (True, False):
        loader = ValidLoader(valid, nn.Sequential(), settings.preprocess, CPU, keep)
        for _ in range(2):
            inputs = torch.cat([batch for batch, _ in loader])
            assert torch.equal(inputs, normalise(valid.pixels[:], settings.preprocess))


SHAPE = ViewShape(100, (3, 4, 4), torch.bfloat16)


def numbered(number):
    for index in torch.arange(SHAPE.photos).split(7):
        yield index, (index[:, None, None, None] + number).expand(-1, 3, 4, 4).bfloat16()


def is_right(view, number):
    return bool((view == (torch.arange(100) + number)[:, None, None, None].bfloat16()).all())


NAME = "activations-" + "0" * 32


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_kill_at_any_part_leaves_only_complete_views(cache):
    """Each process is killed at another part, and starts from the files that the last one left.

    `tests.faults` ends a process at every file operation.
    """

    def killed_at(last):
        parts = iter(range(1, last + 1))

        def compute(number):
            for part in numbered(number):
                if next(parts) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield part

        store = DiskStore(cache, NAME, "test", set(), print)
        CachedViews(SHAPE, compute, store).prepare(range(3))

    for last in (1, 8, 15, 16, 3):
        child = os.fork()
        if not child:
            try:
                killed_at(last)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        for path in cache.folder.glob("*/view-*.bin"):
            number = int(path.stem.partition("-")[2], 16)
            found = DiskStore(cache, NAME, "test", set(), print).find(number, SHAPE)
            assert is_right(found, number)
    views = CachedViews(SHAPE, numbered, DiskStore(cache, NAME, "test", set(), print))
    views.prepare(range(3))
    assert all(is_right(views[number], number) for number in range(3))
    assert not list(cache.folder.glob("*/partial-*"))
    assert len(list(cache.folder.glob("*/view-*.bin"))) == 3


def test_a_truncated_file_is_computed_again(cache):
    store = DiskStore(cache, NAME, "test", set(), print)
    CachedViews(SHAPE, numbered, store).prepare([0])
    (path,) = cache.folder.glob("*/view-*.bin")
    path.write_bytes(path.read_bytes()[:-1])
    assert store.find(0, SHAPE) is None
    assert is_right(CachedViews(SHAPE, numbered, store)[0], 0)


def test_views_in_memory_equal_those_on_disk():
    assert all(is_right(CachedViews(SHAPE, numbered)[number], number) for number in range(2))


def test_a_loader_counts_the_seconds_of_its_activities(open_run):
    loader, _ = open_loaders(open_run(), stage=1)
    rows(loader)
    seconds = loader.timer.read()
    assert seconds["frozen layers"] > 0
    assert seconds["augmentation"] > 0
    assert isinstance(loader, TrainLoader)
    assert isinstance(loader.augmented, AugmentedPhotos)


def test_shared_validation_outputs_equal_those_of_a_stage_alone(open_run):
    """The shared layers run once on the validation photos; each stage gets its own outputs."""
    settings, classifier, activations = open_run()
    found = plan_sharing(classifier, settings, settings.stage)
    classifier.freeze_for(settings.stage[0])
    _, head = activations.loaders(classifier, settings.stage[0], found[0])
    first = [inputs for inputs, _ in head]
    shared = head.source
    classifier.freeze_for(settings.stage[1])
    _, tail = activations.loaders(classifier, settings.stage[1], found[1])
    assert shared is tail
    assert tail._cached
    for stage, share, shared in zip(settings.stage, found, (torch.cat(first), None), strict=True):
        unshared = open_run()[2]
        classifier.freeze_for(stage)
        _, own = unshared.loaders(classifier, stage, SharedPrefix(share.depth, share.views))
        assert own.source is None
        expected = torch.cat([inputs for inputs, _ in own])
        got = shared if shared is not None else torch.cat([inputs for inputs, _ in tail])
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
