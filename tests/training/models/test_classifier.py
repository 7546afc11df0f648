from itertools import pairwise

import pytest
import torch
from torch import nn

from serving.errors import DataError, OptionError
from serving.imaging.preprocess import Preprocess
from training.config.sections import HeadConfig
from training.models import backbones, heads
from training.models.classifier import create_classifier, normalise
from training.models.families import find_family


def test_the_body_equals_the_torchvision_network():
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.densenet121(weights=None).eval()
    images = torch.randn(2, 3, 64, 64)
    body = find_family("densenet121").body(network)
    assert torch.equal(body(images), torch.relu(network.features(images)))


def kinds(head):
    return [type(layer).__name__ for layer in head]


def dropouts(head):
    return [layer.p for layer in head if isinstance(layer, nn.Dropout)]


def widths(head):
    return [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)]


def test_the_concat_pool_head_has_the_expected_layers_and_state_dict_keys():
    head = heads.build(HeadConfig(), 100, 7)
    norm, drop, linear = "BatchNorm1d", "Dropout", "Linear"
    assert kinds(head) == [norm, drop, linear, "ReLU", norm, drop, linear]
    assert widths(head) == [(200, 512), (512, 7)]
    assert dropouts(head) == [0.25, 0.5]
    old = nn.Sequential(
        nn.BatchNorm1d(200),
        nn.Dropout(0.25),
        nn.Linear(200, 512),
        nn.ReLU(),
        nn.BatchNorm1d(512),
        nn.Dropout(0.5),
        nn.Linear(512, 7),
    )
    head.load_state_dict(old.state_dict())
    x = torch.randn(4, 200)
    assert torch.equal(head.eval()(x), old.eval()(x))


@pytest.mark.parametrize("pool", [heads.AvgPool(), heads.ConcatPool()])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_of_the_pooling_has_the_memory_format_of_its_input(pool, layout):
    torch.manual_seed(0)
    images = torch.randn(4, 6, 5, 5).contiguous(memory_format=layout).requires_grad_()
    seen = []
    map_ = images * 2
    map_.register_hook(seen.append)  # hooks run in order: before and after the pooling's hook
    pooled = pool(map_)
    map_.register_hook(seen.append)
    (pooled**2).sum().backward()
    assert seen[-1].is_contiguous(memory_format=layout)
    if isinstance(pool, heads.AvgPool):  # the memory format that autograd chooses
        assert not seen[0].is_contiguous(memory_format=torch.channels_last)
    plain = images.detach().clone().requires_grad_()
    means = (plain * 2).mean(dim=(2, 3))
    most = [(plain * 2).amax(dim=(2, 3))] if isinstance(pool, heads.ConcatPool) else []
    (torch.cat([means, *most], dim=1) ** 2).sum().backward()
    torch.testing.assert_close(images.grad, plain.grad)


@pytest.mark.parametrize("kind", ["concat_pool", "deep"])
@pytest.mark.parametrize("hidden", [(), (16,), (32, 16), (8, 8, 8)])
def test_heads_have_the_requested_layers_and_widths(kind, hidden):
    head = heads.build(HeadConfig(kind=kind, hidden=hidden, dropout=0.4), 10, 3)
    chain = [20 if kind == "concat_pool" else 10, *hidden, 3]
    assert widths(head) == list(pairwise(chain))
    assert dropouts(head) == [*[0.2] * len(hidden), 0.4]
    block = {
        "concat_pool": ["BatchNorm1d", "Dropout", "Linear", "ReLU"],
        "deep": ["Dropout", "Linear", "BatchNorm1d", "ReLU"],
    }[kind]
    last = ["BatchNorm1d", "Dropout", "Linear"] if kind == "concat_pool" else ["Dropout", "Linear"]
    assert kinds(head) == [*block * len(hidden), *last]
    assert head(torch.randn(2, chain[0])).shape == (2, 3)


def test_a_list_of_dropouts_has_one_value_per_linear_layer():
    config = HeadConfig(kind="deep", hidden=(32, 16), dropout=(0.0, 0.1, 0.35))
    assert dropouts(heads.build(config, 10, 3)) == [0.0, 0.1, 0.35]
    linear = HeadConfig(kind="linear", dropout=(0.2,))
    head = heads.build(linear, 10, 3)
    assert (kinds(head), dropouts(head), widths(head)) == (["Dropout", "Linear"], [0.2], [(10, 3)])


@pytest.mark.parametrize(("kind", "factor"), [("concat_pool", 2), ("deep", 1), ("linear", 1)])
def test_the_output_of_the_pooling_fits_the_head(kind, factor):
    config = HeadConfig(kind=kind, hidden=4)
    x = torch.randn(2, 5, 3, 4)
    pooled = heads.build_pool(config, "resnet18", "")(x)
    assert pooled.shape == (2, 5 * factor)
    assert heads.build(config, 5, 3)(pooled).shape == (2, 3)


@pytest.mark.parametrize("kind", ["deep", "linear"])
def test_a_body_that_pools_by_itself_is_not_pooled_again(kind):
    pooled = torch.randn(2, 5)
    assert heads.build_pool(HeadConfig(kind=kind), "vit_b_16", "class token")(pooled) is pooled


def test_concat_pool_with_a_body_that_pools_by_itself_is_an_error():
    expected = r"vit_b_32 pools by itself \(class token\); use head.kind = 'linear' or 'deep'"
    with pytest.raises(OptionError, match=expected):
        create_classifier("vit_b_32", 3, arch_args={"image_size": 32})


def test_concat_pool_is_average_and_maximum():
    x = torch.randn(2, 5, 3, 4)
    pooled = heads.ConcatPool()(x)
    assert torch.allclose(pooled[:, :5], x.flatten(2).mean(2))
    assert torch.equal(pooled[:, 5:], x.flatten(2).max(2).values)


def test_normalise_equals_torchvision():
    from torchvision.transforms import v2

    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    preprocess = Preprocess()
    theirs = v2.Normalize(preprocess.mean, preprocess.std)(pixels.permute(0, 3, 1, 2) / 255)
    assert torch.allclose(normalise(pixels, preprocess), theirs, atol=1e-6)


def test_weights_are_loaded_from_a_file(tmp_path):
    import torchvision

    torch.manual_seed(1)
    network = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path / "w.pth"
    torch.save(network.state_dict(), path)
    body = backbones.build("squeezenet1_1", {}, str(path)).body
    for key, value in body.state_dict().items():
        assert torch.equal(value, network.state_dict()[f"features.{key}"])


def test_a_folder_as_weights_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a folder, not a file of weights"):
        create_classifier("mobilenet_v2", 3, weights=str(tmp_path))


def test_weights_of_a_deeper_network_are_an_error(tmp_path):
    import torchvision

    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"not for resnet18: it also has layer1\.2"):
        backbones.build("resnet18", {}, str(tmp_path / "w.pth"))


def test_weights_with_old_densenet_keys_are_read(tmp_path):
    import re

    import torchvision

    torch.manual_seed(1)
    state = torchvision.models.densenet121(weights=None).state_dict()
    new = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))([12]\..*)")
    torch.save({new.sub(r"\1.\2", k): v for k, v in state.items()}, tmp_path / "w.pth")
    body = backbones.build("densenet121", {}, str(tmp_path / "w.pth")).body
    key = "denseblock1.denselayer1.norm1.weight"
    assert torch.equal(body.state_dict()[key], state[f"features.{key}"])


def test_imagenet_weights_come_from_the_cache_of_torchvision(tmp_path, monkeypatch):
    import torchvision

    torch.manual_seed(1)
    network = torchvision.models.squeezenet1_1(weights=None)
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / url.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    body = backbones.build("squeezenet1_1", {}, "imagenet").body
    assert torch.equal(body.state_dict()["0.weight"], network.state_dict()["features.0.weight"])


def test_errors_name_the_option_and_the_remedy(tmp_path):
    with pytest.raises(OptionError, match=r"mobilenet_v22.*did you mean 'mobilenet_v2'"):
        backbones.build("mobilenet_v22", {})
    with pytest.raises(OptionError, match=r"arch_args.*width_mlut"):
        backbones.build("mobilenet_v2", {"width_mlut": 1})
    with pytest.raises(DataError, match="no such file"):
        backbones.build("resnet18", {}, str(tmp_path / "missing.pth"))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match="is not for squeezenet1_1"):
        backbones.build("squeezenet1_1", {}, str(tmp_path / "other.pth"))
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        backbones.build("squeezenet1_1", {}, str(tmp_path / "empty.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(DataError, match="is a text, not weights"):
        backbones.build("squeezenet1_1", {}, str(tmp_path / "text.pth"))


class PrintsWhenUnpickled:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_with_code_is_an_error_and_does_not_run(tmp_path, capsys):
    torch.save(PrintsWhenUnpickled(), tmp_path / "harm.pth")
    with pytest.raises(DataError):
        backbones.build("squeezenet1_1", {}, str(tmp_path / "harm.pth"))
    assert "harm" not in capsys.readouterr().out
