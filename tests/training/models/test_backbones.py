import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from serving.errors import DataError, OptionError
from tests.support.shallow_networks import replace_networks
from training.config.schema import Recipe
from training.models import backbones, families, weights
from training.models.classifier import create_classifier, normalise

GROUPS = {  # family -> number of layer groups
    "AlexNet": 3,
    "VGG": 5,
    "ResNet": 5,
    "ResNeXt": 5,
    "Wide ResNet": 5,
    "DenseNet": 5,
    "SqueezeNet": 4,
    "GoogLeNet": 5,
    "Inception v3": 5,
    "MobileNetV2": 5,
    "MobileNetV3": 5,
    "MNASNet": 5,
    "ShuffleNetV2": 4,
    "EfficientNet": 5,
    "EfficientNetV2": 5,
    "RegNet": 5,
    "ConvNeXt": 4,
    "Swin": 4,
    "SwinV2": 4,
    "ViT": 5,
    "MaxViT": 5,
}
SMALLEST = {  # builder's options and a small image size
    "resnet18": ({}, 32),
    "densenet121": ({}, 32),
    "squeezenet1_1": ({}, 32),
    "googlenet": ({}, 32),
    "mobilenet_v2": ({"width_mult": 0.25}, 32),
    "mobilenet_v3_small": ({}, 32),
    "mnasnet0_5": ({}, 32),
    "shufflenet_v2_x0_5": ({}, 32),
    "efficientnet_b0": ({}, 32),
    "regnet_y_400mf": ({}, 32),
    "swin_t": ({}, 32),
    "vit_b_32": ({"image_size": 32}, 32),
}
SHALLOW = {  # large, or similar to one above: of `tests.support.shallow_networks`
    "alexnet": ({}, 63),
    "inception_v3": ({}, 75),
    "convnext_tiny": ({}, 32),
    "vgg11_bn": ({}, 32),
    "resnext50_32x4d": ({}, 32),
    "wide_resnet50_2": ({}, 32),
    "efficientnet_v2_s": ({}, 32),
    "swin_v2_t": ({}, 32),
    "maxvit_t": ({}, 224),
}
FAMILIES = [(arch, *values) for arch, values in (SMALLEST | SHALLOW).items()]


@pytest.fixture
def networks(request, monkeypatch):
    """Shallow networks if the test's network is in `SHALLOW`."""
    if request.getfixturevalue("arch") in SHALLOW:
        replace_networks(monkeypatch)


def classifier_of(network):
    """The classifier of a torchvision network, after the features."""
    if isinstance(network, torchvision.models.MaxVit):
        return network.classifier[-1]
    names = ("classifier", "fc", "heads", "head")
    return next(getattr(network, name) for name in names if hasattr(network, name))


def in_features(network):
    layers = [m for m in classifier_of(network).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    positions = {torchvision.models.AlexNet: 6 * 6, torchvision.models.VGG: 7 * 7}
    return layers[0].weight.shape[1] // positions.get(type(network), 1)


NAMES = torchvision.models.list_models(module=torchvision.models)


def test_every_architecture_of_torchvision_is_known():
    assert backbones.names() == NAMES
    assert {backbones.family_of(name).title for name in NAMES} == set(GROUPS)


@pytest.mark.parametrize(
    "names",
    [[*SMALLEST, *SHALLOW], pytest.param(NAMES, marks=pytest.mark.process)],
    ids=["families", "all"],
)
def test_every_architecture_has_its_layer_groups_and_width(names, monkeypatch):
    built = []
    real = torchvision.models.get_model

    def get_model(*args, **options):
        built.append(real(*args, **options))
        return built[-1]

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    assert {backbones.family_of(name).title for name in names} == set(GROUPS)
    for name in names:
        backbone = backbones.build_on_meta(name, {})
        assert {p.device.type for p in backbone.body.parameters()} == {"meta"}
        assert len(backbone.groups) == GROUPS[backbones.family_of(name).title], name
        assert backbone.width == in_features(built.pop()), name
        assert backbone.groups[0] == 0
        for start, end in zip(
            backbone.groups, [*backbone.groups[1:], len(backbone.body)], strict=True
        ):
            assert list(backbone.body[start:end].parameters()), name


def test_layer_groups_begin_at_the_expected_layers():
    def first_of_groups(arch):
        backbone = backbones.build_on_meta(arch, {})
        names = [name for name, _ in backbone.body.named_children()]
        return [names[start] for start in backbone.groups]

    assert first_of_groups("resnet50") == ["conv1", "maxpool", "layer2", "layer3", "layer4"]
    assert first_of_groups("mobilenet_v2") == ["0", "2", "4", "7", "14"]
    assert first_of_groups("swin_t") == ["0", "2", "4", "6"]
    assert first_of_groups("inception_v3")[2:] == ["maxpool2", "Mixed_6a", "Mixed_7a"]
    blocks = [f"encoder_layer_{i}" for i in (0, 6, 12, 18)]
    assert first_of_groups("vit_l_16") == ["tokens", *blocks]


def test_a_network_on_the_meta_device_has_the_shapes_of_the_real_one():
    real = backbones.build("regnet_y_400mf", {})
    backbones._GROUPS_AND_WIDTH.clear()
    on_meta = backbones.build_on_meta("regnet_y_400mf", {})
    shapes = [{k: v.shape for k, v in b.body.state_dict().items()} for b in (real, on_meta)]
    assert shapes[0] == shapes[1]
    assert (real.groups, real.width) == (on_meta.groups, on_meta.width)
    assert all(m.training for m in real.body.modules())
    out = real.body(torch.randn(2, 3, 64, 64))
    *_, last = backbones.meta_outputs(real.body, 64)
    assert out.shape[1:] == last.shape[1:]


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(("arch", "arch_args", "size"), FAMILIES)
def test_a_training_step_changes_every_group(arch, arch_args, size):
    torch.manual_seed(0)
    kind = "deep" if backbones.family_of(arch).pooled else "concat_pool"
    classifier = create_classifier(arch, 3, arch_args=arch_args, head={"kind": kind, "hidden": 8})
    groups = classifier.trainable_groups()
    assert len(groups) == len(classifier.groups) + 1
    before = [[p.detach().clone() for p in parameters] for _, parameters in groups]
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    loss = cross_entropy(classifier(torch.randn(3, 3, size, size)), torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())
    optimizer.step()
    for (name, parameters), old in zip(groups, before, strict=True):
        assert any(not torch.equal(p, o) for p, o in zip(parameters, old, strict=True)), name


@torch.no_grad()
@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(("arch", "arch_args", "size"), FAMILIES)
def test_torchvision_weights_give_torchvision_features(arch, arch_args, size, monkeypatch):
    torch.manual_seed(0)
    options = (
        {"init_weights": True} if backbones.family_of(arch).fixed else {}
    )  # with auxiliary classifiers
    network = torchvision.models.get_model(arch, **arch_args, **options).eval()
    monkeypatch.setattr(weights, "read_state_dict", lambda *_: network.state_dict())
    backbone = backbones.build(arch, arch_args, "imagenet")
    seen = []
    classifier_of(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, size, size)
    network(images)
    theirs = seen[0].flatten(1)
    ours = backbone.body.eval()(images)
    assert ours.ndim == (2 if backbone.pooled else 4)
    if not backbone.pooled:
        ours = adaptive_avg_pool2d(ours, round((theirs.shape[1] / backbone.width) ** 0.5))
    assert theirs.std() > 0
    torch.testing.assert_close(ours.flatten(1), theirs)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_preprocessing_with_mean_one_half_replaces_transform_input(arch, monkeypatch):
    torch.manual_seed(0)
    network = torchvision.models.get_model(arch, transform_input=True, init_weights=True).eval()
    monkeypatch.setattr(weights, "read_state_dict", lambda *_: network.state_dict())
    body = backbones.build(arch, {}, "imagenet").body.eval()
    recipe = Recipe.model_validate({"name": "x", "arch": arch, "stage": [{"name": "head"}]})
    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    ours = body(normalise(pixels, recipe.preprocess))
    seen = []
    network.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    other = Recipe.model_validate({"name": "x", "arch": "resnet18", "stage": [{"name": "head"}]})
    network(normalise(pixels, other.preprocess))
    assert (ours - seen[0]).abs().max() <= 1e-4 * seen[0].abs().max()
    unlike = body(normalise(pixels, other.preprocess))
    assert (unlike - seen[0]).abs().max() > 1e-2 * seen[0].abs().max()


def test_fixed_options_can_not_be_set():
    with pytest.raises(OptionError, match=r"arch_args\.transform_input can't be set"):
        backbones.build_on_meta("inception_v3", {"transform_input": True})


@pytest.mark.parametrize(
    ("arch", "arch_args", "size", "remedy"),
    [
        ("vit_b_16", {}, 200, r"use 224 \(arch_args\.image_size changes it\)"),
        ("vit_b_16", {"image_size": 384}, 224, "use 384"),
        ("maxvit_t", {}, 448, r"use 224 \(arch_args\.input_size changes it"),
        ("inception_v3", {}, 74, "use 75 or more"),
        ("alexnet", {}, 32, "use 63 or more"),
        ("resnet18", {}, 0, "use 1 or more"),
    ],
)
def test_errors_for_unsupported_sizes_name_a_supported_one(arch, arch_args, size, remedy):
    with pytest.raises(
        OptionError, match=f"preprocess.size = {size} does not fit {arch}: {remedy}"
    ):
        backbones.check_size(arch, arch_args, size)


@pytest.mark.parametrize(
    ("arch", "arch_args", "size"),
    [
        ("vit_b_16", {}, 224),
        ("vit_b_16", {"image_size": 384}, 384),
        ("maxvit_t", {"input_size": [448, 448]}, 448),
        ("inception_v3", {}, 75),
        ("alexnet", {}, 63),
        ("swin_t", {}, 201),
    ],
)
def test_supported_image_sizes_are_accepted(arch, arch_args, size):
    backbones.check_size(arch, arch_args, size)
    *_, last = backbones.meta_outputs(backbones.build_on_meta(arch, arch_args).body, size)
    assert 0 not in last.shape


def test_the_error_for_maxvit_sizes_names_the_multiple():
    for wrong in ([256, 256], 448):
        with pytest.raises(OptionError, match=r"use \[N, N\], N a multiple of 224"):
            backbones.build_on_meta("maxvit_t", {"input_size": wrong})


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return torchvision.models.vit_b_32(image_size=64).state_dict()


def test_weights_with_old_vit_keys_are_read(vit, monkeypatch):
    old = {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
        for key, value in vit.items()
    }
    assert old.keys() != vit.keys()
    monkeypatch.setattr(weights, "read_state_dict", lambda *_: old)
    body = backbones.build("vit_b_32", {"image_size": 64}, "imagenet").body
    key = "encoder_layer_3.mlp.3.weight"
    assert torch.equal(body.state_dict()[key], vit[f"encoder.layers.{key}"])


def test_the_error_for_vit_weights_names_their_image_size(vit, monkeypatch):
    monkeypatch.setattr(weights, "read_state_dict", lambda *_: vit)
    with pytest.raises(DataError, match=r"pos_embedding .*for arch_args\.image_size = 64"):
        backbones.build("vit_b_32", {}, "imagenet")


def test_imagenet_weights_are_selected_by_image_size(monkeypatch):
    requested = []

    def get(entry, **_):
        requested.append(entry.name)
        raise OSError("no network")

    kind = torchvision.models.ViT_H_14_Weights
    monkeypatch.setattr(kind, "get_state_dict", get)
    for size in (224, 518):
        with pytest.raises(DataError, match="can't be downloaded"):
            weights.read_state_dict("vit_h_14", "imagenet", size)
    assert requested == ["IMAGENET1K_SWAG_LINEAR_V1", "IMAGENET1K_SWAG_E2E_V1"]


def test_every_architecture_is_in_one_family_only():
    import re

    for name in NAMES:
        assert sum(bool(re.fullmatch(f.archs, name)) for f in families.FAMILIES) == 1, name


def test_pixels_are_normalised_as_the_weights_were_trained():
    for name in backbones.names():
        family = backbones.family_of(name)
        every = torchvision.models.get_model_weights(name)
        side = family.image_size({})
        fitting = [one for one in every if one.meta["min_size"] == (side, side)]
        entry = every.DEFAULT if every.DEFAULT in fitting or not fitting else fitting[0]
        theirs = entry.transforms()
        wanted = tuple(theirs.mean), tuple(theirs.std)
        if "transform_input" in family.fixed:  # the network would scale them to [-1, 1]
            wanted = (0.5,) * 3, (0.5,) * 3
        recipe = Recipe.model_validate({"name": "x", "arch": name, "stage": [{"name": "head"}]})
        assert (recipe.preprocess.mean, recipe.preprocess.std) == wanted, name


@pytest.mark.parametrize(
    ("arch", "arch_args", "message"),
    [
        ("resnet18", {"num_classes": 3}, r"arch_args\.num_classes .*\[head\]"),
        ("resnet18", {"weights": None}, r"arch_args\.weights .*set weights = "),
        ("resnet18", {"progress": False}, r"arch_args\.progress "),
        ("mobilenet_v2", {"dropout": 0.9}, r"arch_args\.dropout .*set head\.dropout"),
        ("convnext_tiny", {"dropout": 0.9}, r"arch_args\.dropout: convnext_tiny has no such"),
        ("mobilenet_v3_small", {"width": 2}, r"arch_args\.width: .* has no such option"),
    ],
)
def test_builder_options_without_an_effect_are_errors(arch, arch_args, message):
    for make in (backbones.build, backbones.build_on_meta):
        with pytest.raises(OptionError, match=message):
            make(arch, arch_args)


@pytest.mark.parametrize(
    ("arch", "arch_args"),
    [
        ("vit_b_32", {"dropout": 0.1}),
        ("swin_t", {"dropout": 0.1}),
        ("densenet121", {"drop_rate": 0.1}),
        ("convnext_tiny", {"stochastic_depth_prob": 0.3}),
        ("mobilenet_v3_small", {"width_mult": 0.5, "reduced_tail": True, "dilated": False}),
    ],
)
def test_builder_options_with_an_effect_are_accepted(arch, arch_args):
    backbones.build_on_meta(arch, arch_args)


@pytest.mark.parametrize("size", ["x", [], [[]], None, 0, True, {}])
def test_an_image_size_that_is_not_a_number_is_an_error(size):
    with pytest.raises(OptionError, match=r"arch_args\.image_size = .*a number of pixels"):
        backbones.check_size("vit_b_16", {"image_size": size}, 224)


def test_weights_with_keys_that_are_not_strings_are_an_error(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="must map names to tensors"):
        weights.read_state_dict("resnet18", str(tmp_path / "w.pth"), 224)


@pytest.mark.parametrize("path", ["~no-such-user/x.pth", "n" * 300])
def test_impossible_paths_of_weights_are_errors(path):
    with pytest.raises(DataError, match="no such file"):
        weights.read_state_dict("resnet18", path, 224)
