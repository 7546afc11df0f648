import pytest
import torch
from torch import nn

from serving.errors import DataError, OptionError
from serving.preprocess import Preprocess
from training import backbones, model, optim
from training.options import OptimizerConfig

SMALLEST = {  # the smallest of each family -> layer groups of its body
    "alexnet": 3,
    "vgg11_bn": 5,
    "squeezenet1_1": 4,
    "mobilenet_v2": 5,
    "mobilenet_v3_small": 5,
    "efficientnet_b0": 5,
    "mnasnet0_5": 5,
    "shufflenet_v2_x0_5": 4,
    "regnet_y_400mf": 5,
    "convnext_tiny": 4,
    "densenet121": 5,
    "resnet18": 5,
}


@pytest.mark.parametrize(("arch", "groups"), SMALLEST.items())
def test_bodies_are_cut_into_groups_that_train(arch, groups):
    if arch in ("alexnet", "vgg11_bn"):  # their unused classifiers are most of their weight
        backbone = backbones.build(arch, {"num_classes": 2})
    else:
        backbone = backbones.build(arch, {})
    assert len(backbone.groups) == groups
    assert backbone.groups[0] == 0
    ends = [*backbone.groups[1:], len(backbone.body)]
    for start, end in zip(backbone.groups, ends, strict=True):
        assert sum(p.numel() for p in backbone.body[start:end].parameters()) > 0
    out = backbone.body.eval()(torch.zeros(1, 3, 64, 64))
    assert out.shape[1] == backbone.width


def test_the_body_computes_what_torchvision_computes():
    import torchvision

    torch.manual_seed(0)
    whole = torchvision.models.densenet121(weights=None).eval()
    images = torch.randn(2, 3, 64, 64)
    body = backbones._densenet(whole)
    assert torch.equal(body(images), torch.relu(whole.features(images)))


def small(kind="concat_pool"):
    torch.manual_seed(0)
    return model.build(
        "mobilenet_v2", 3, arch_args={"width_mult": 0.25}, head={"kind": kind, "hidden": 16}
    )


@pytest.mark.parametrize("kind", ["concat_pool", "linear"])
@pytest.mark.parametrize("unfrozen", [0, 1, 3, 99])
def test_prefix_and_suffix_make_the_whole(kind, unfrozen):
    classifier = small(kind).eval()
    images = torch.randn(2, 3, 64, 64)
    whole = classifier(images)
    classifier.freeze_to(unfrozen)
    assert torch.equal(classifier.suffix(classifier.prefix(images)), whole)
    assert torch.equal(classifier.head(classifier.features(images)), whole)


@pytest.mark.parametrize("unfrozen", [0, 2, 99])
def test_frozen_parameters_and_buffers_do_not_move_and_the_rest_does(unfrozen):
    classifier = small()
    classifier.freeze_to(unfrozen)
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    classifier.train()
    optimizer = optim.build(classifier, OptimizerConfig(), 0.1, 2.0)
    for _ in range(2):
        logits = classifier(torch.randn(4, 3, 64, 64))
        logits.square().mean().backward()
        optimizer.step()
    frozen = [f"body.{name}." for name, _ in list(classifier.body.named_children())]
    frozen = frozen[: classifier.frozen]
    moved = 0
    for key, value in classifier.state_dict().items():
        if key.startswith(tuple(frozen)):
            assert torch.equal(value, before[key]), key
        else:
            moved += not torch.equal(value, before[key])
    assert moved > 0
    assert (classifier.frozen > 0) == (unfrozen != 99)


def test_the_frozen_part_stays_in_eval_mode_through_train():
    classifier = small()
    classifier.freeze_to(1)
    classifier.train()
    for index, child in enumerate(classifier.body):
        modes = {m.training for m in child.modules()}
        assert modes == {index >= classifier.frozen}
    assert classifier.head.training


def test_fixed_norms_keep_their_statistics_and_train_their_scale():
    classifier = small()
    classifier.fixed_norms = True
    classifier.freeze_to(2)
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    classifier.train()
    optimizer = optim.build(classifier, OptimizerConfig(), 0.1, 1.0)
    for _ in range(2):
        classifier(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    after = classifier.state_dict()
    for key in before:
        if key.startswith("body.") and "running_" in key:
            assert torch.equal(after[key], before[key]), key
    assert not torch.equal(after["body.18.1.weight"], before["body.18.1.weight"])
    assert not torch.equal(after["head.0.running_mean"], before["head.0.running_mean"])


def test_each_group_has_its_rate_and_norms_and_biases_do_not_decay():
    classifier = small()
    classifier.freeze_to(2)
    optimizer = optim.build(classifier, OptimizerConfig(weight_decay=0.5), 0.9, 3.0)
    rates = sorted({group["base_lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([0.1, 0.3, 0.9])
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in classifier.parameters() if p.requires_grad}
    norms = {
        id(p)
        for m in classifier.modules()
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
        for p in m.parameters()
    }
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            spared = id(parameter) in norms or parameter.ndim == 1
            assert group["weight_decay"] == (0.0 if spared else 0.5)


def test_concat_pool_is_average_and_maximum():
    x = torch.randn(2, 5, 3, 4)
    pooled = model.ConcatPool()(x)
    assert torch.allclose(pooled[:, :5], x.flatten(2).mean(2))
    assert torch.equal(pooled[:, 5:], x.flatten(2).max(2).values)


def test_normalise_is_torchvisions():
    from torchvision.transforms import v2

    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    preprocess = Preprocess()
    theirs = v2.Normalize(preprocess.mean, preprocess.std)(pixels.permute(0, 3, 1, 2) / 255)
    assert torch.allclose(model.normalise(pixels, preprocess), theirs, atol=1e-6)


def test_weights_from_a_file(tmp_path):
    import torchvision

    torch.manual_seed(1)
    whole = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path / "w.pth"
    torch.save(whole.state_dict(), path)
    body = backbones.build("squeezenet1_1", {}, str(path)).body
    for key, value in body.state_dict().items():
        assert torch.equal(value, whole.state_dict()[f"features.{key}"])


def test_weights_of_a_deeper_sister_are_refused(tmp_path):
    import torchvision

    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"not for resnet18: it also holds layer1\.2"):
        backbones.build("resnet18", {}, str(tmp_path / "w.pth"))


def test_the_old_names_of_densenets_weights_are_read(tmp_path):
    import re

    import torchvision

    torch.manual_seed(1)
    state = torchvision.models.densenet121(weights=None).state_dict()
    new = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))([12]\..*)")
    torch.save({new.sub(r"\1.\2", k): v for k, v in state.items()}, tmp_path / "w.pth")
    body = backbones.build("densenet121", {}, str(tmp_path / "w.pth")).body
    key = "denseblock1.denselayer1.norm1.weight"
    assert torch.equal(body.state_dict()[key], state[f"features.{key}"])


def test_imagenet_weights_come_from_torchvisions_own_cache(tmp_path, monkeypatch):
    import torchvision

    torch.manual_seed(1)
    whole = torchvision.models.squeezenet1_1(weights=None)
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(whole.state_dict(), folder / url.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    body = backbones.build("squeezenet1_1", {}, "imagenet").body
    assert torch.equal(body.state_dict()["0.weight"], whole.state_dict()["features.0.weight"])


def test_bad_requests_name_the_option_and_the_remedy(tmp_path):
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
    with pytest.raises(DataError, match="empty or cut short"):
        backbones.build("squeezenet1_1", {}, str(tmp_path / "empty.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(DataError, match="is no state dict"):
        backbones.build("squeezenet1_1", {}, str(tmp_path / "text.pth"))


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_with_code_in_it_is_refused(tmp_path, capsys):
    torch.save(Harm(), tmp_path / "harm.pth")
    with pytest.raises(DataError):
        backbones.build("squeezenet1_1", {}, str(tmp_path / "harm.pth"))
    assert "harm" not in capsys.readouterr().out
