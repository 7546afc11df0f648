"""BatchNorm fusion changes only rounding, and reports each BatchNorm."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental import optimization

from serving.errors import WorkError
from serving.imaging.preprocess import Preprocess
from tests.export.conftest import pixels
from tests.support.random_batchnorms import randomise_batchnorms, scale_logits
from tests.support.shallow_networks import replace_networks
from training.models.classifier import create_classifier, normalise
from training.models.fuse_batchnorm import Affine, fuse

# Number of BatchNorms, and of those that can't be folded. The head has two, both folded.
FAST = {"resnet18": (22, 0), "mobilenet_v2": (54, 0), "squeezenet1_1": (2, 0)}
SHALLOW = {  # of `tests.support.shallow_networks`
    "mobilenet_v3_small": (12, 0),
    "efficientnet_b0": (12, 0),
    "efficientnet_v2_s": (13, 0),
    "vgg11_bn": (6, 0),
    "shufflenet_v2_x0_5": (28, 0),
    "mnasnet0_5": (23, 0),
    "regnet_y_400mf": (14, 0),
    "alexnet": (2, 0),
    "convnext_tiny": (2, 0),
    "densenet121": (23, 12),
    "googlenet": (23, 0),
    "inception_v3": (50, 0),
    "resnext50_32x4d": (11, 0),
    "wide_resnet50_2": (11, 0),
    "swin_t": (2, 0),
    "swin_v2_t": (2, 0),
    "vit_b_32": (1, 0),
    "maxvit_t": (5, 0),
}
SIZES = {"inception_v3": 75, "maxvit_t": 224}
ALL = [*FAST.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SHALLOW.items())]


@pytest.fixture
def networks(request, monkeypatch):
    """Shallow networks, unless the test's network is in `FAST`."""
    if request.getfixturevalue("arch") not in FAST:
        replace_networks(monkeypatch)


def network(arch, *, drawn=False):
    """A classifier in eval mode, and normalised images; its logits on them vary by about 2."""
    torch.manual_seed(0)
    small = {"arch_args": {"image_size": 64}} if arch == "vit_b_32" else {}
    size = SIZES.get(arch, 64)
    images = normalise(pixels(12, size), Preprocess(size=size))
    kind = "deep" if arch in ("vit_b_32", "maxvit_t") else "concat_pool"
    built = create_classifier(arch, 5, head={"kind": kind, "hidden": 32}, **small)
    return scale_logits(randomise_batchnorms(built, None if drawn else images), images), images


def same(one, other):
    """Largest difference relative to the largest value of `one`."""
    return float(((one - other).abs().max() / one.abs().max()).detach())


@torch.no_grad()
@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(("arch", "expected"), ALL)
def test_a_fused_network_gives_the_outputs_of_the_unfused_one(arch, expected):
    classifier, images = network(arch, drawn=True)
    fused, report = fuse(classifier)
    assert (report.before, len(report.left)) == expected
    assert not [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert same(classifier(images), fused(images)) <= 1e-5
    double = copy.deepcopy(classifier).double()
    fused, _ = fuse(double)
    assert same(double(images.double()), fused(images.double())) <= 1e-10


@torch.no_grad()
@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(
    "arch", [*FAST, *(pytest.param(a, marks=pytest.mark.slow) for a in SHALLOW)]
)
def test_fusion_error_is_rounding_error_where_outputs_depend_on_every_layer(arch):
    classifier, images = network(arch)
    fused, _ = fuse(classifier)
    double = copy.deepcopy(classifier).double()
    truth = double(images.double())
    assert same(truth, fuse(double)[0](images.double())) <= 1e-10
    # Such a network amplifies rounding: its own float32 error is the reference.
    own = same(truth, classifier(images).double())
    assert same(truth, fused(images).double()) <= max(1e-5, 10 * own)


def test_the_model_itself_is_not_changed():
    classifier, _ = network("squeezenet1_1")
    classifier.train()
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    fuse(classifier)
    assert classifier.training
    after = classifier.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_head_folds_through_dropout_into_its_linears():
    _, report = fuse(network("squeezenet1_1")[0])
    assert report.folded == {"head.0": "head.2", "head.4": "head.6"}
    assert report.to_dict() == {"before": 2, "folded": 2, "left": {}}


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(6, 9, 3, padding=1, groups=3), nn.BatchNorm2d(9)], (6, 5, 5)),
        ([nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6, affine=False)], (6, 5, 5)),
        ([nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)], (6, 9)),
        ([nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)], (2, 3, 3, 3)),
        ([nn.Linear(6, 4), nn.Dropout(), nn.BatchNorm1d(4)], (6,)),
        ([nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 4, bias=False)], (6,)),
        ([nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, groups=2)], (6, 5, 5)),
        ([nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")], (6, 5, 5)),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)], (3, 4, 4)),
    ],
)
def test_adjacent_linear_layers_are_folded(layers, shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64)
    net = randomise_batchnorms(nn.Sequential(*layers).double(), x)
    fused, report = fuse(net)
    assert report.before
    assert report.left == {}
    assert same(net(x), fused(x)) <= 1e-12


class Forked(nn.Module):
    """The convolution's output is also read by another node."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class ConvTwice(Forked):
    """The convolution is called twice."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x * 2)


class NormTwice(Forked):
    """The BatchNorm is called twice."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(x)


class Padded(Forked):
    """Zeros are padded between the BatchNorm and the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(x))


class Columns(nn.Module):
    """The BatchNorm normalises another axis than the Linear's."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(2)[..., :5]))


@pytest.mark.parametrize("kind", [Forked, ConvTwice, NormTwice, Padded, Columns])
def test_a_batchnorm_that_can_not_be_folded_becomes_a_multiply_add_with_a_reason(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    net = randomise_batchnorms(kind().double(), x)
    fused, report = fuse(net)
    assert report.folded == {}
    assert list(report.left) == ["norm"]
    assert report.left["norm"]
    assert sum(isinstance(module, Affine) for module in fused.modules()) == 1
    assert same(net(x), fused(x)) <= 1e-12


def test_a_batchnorm_without_statistics_stays():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    fused, report = fuse(net)
    assert "no running statistics" in report.left["1"]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(net(x), fused(x))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_the_error_for_an_untraceable_network_names_it():
    with pytest.raises(WorkError, match="Branching can't be traced"):
        fuse(Branching())


def torch_fused(net):
    """The weights of torch's own fusion; the reference for training."""
    return [value for value in optimization.fuse(net).state_dict().values() if value.dim()]


@pytest.mark.parametrize("arch", ["mobilenet_v2", "densenet121", "googlenet", "regnet_y_400mf"])
def test_fusion_in_the_dtype_of_the_weights_equals_torch_s_bit_for_bit(arch):
    classifier, _ = network(arch, drawn=True)
    fused, report = fuse(classifier, dtype=None, into_previous_only=True)
    weights = [value for value in fused.state_dict().values() if value.dim()]
    expected = torch_fused(classifier)
    assert len(weights) == len(expected)
    assert all(map(torch.equal, weights, expected))
    kinds = [type(module) for module in fused.modules()]
    assert Affine not in kinds
    assert sum(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds) == len(
        report.left
    )


def test_into_previous_only_leaves_batchnorms_before_a_layer():
    net = randomise_batchnorms(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)))
    fused, report = fuse(net, into_previous_only=True)
    assert report.folded == {}
    assert list(report.left) == ["0"]
    x = torch.randn(3, 6)
    assert torch.equal(net(x), fused(x))
