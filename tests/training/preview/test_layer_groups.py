import re

import pytest

import fledge
from serving.errors import OptionError
from training.config.schema import Recipe
from training.models import backbones, freezing
from training.models.classifier import create_classifier
from training.preview import layer_groups

NUMBER = r"[0-9]+(?:\.[0-9]+ [kM])?"


def recipe(**values):
    stages = [{"name": "head"}, {"name": "tail", "unfreeze": 2, "batchnorm": "train"}]
    base = {"name": "x", "arch": "mobilenet_v2", "stage": stages, "preprocess": {"size": 64}}
    return Recipe.model_validate({**base, **values})


def count(text):
    number, _, unit = text.partition(" ")
    return float(number) * {"": 1, "k": 1e3, "M": 1e6}[unit]


@pytest.mark.parametrize(
    "arch", ["resnet18", "mobilenet_v2", "swin_t", "vit_b_16", "maxvit_t", "vgg11", "inception_v3"]
)
def test_every_layer_has_a_line_and_every_group_its_number(arch):
    found = backbones.build_on_meta(arch, {})
    title, _, head, *lines = layer_groups.describe(layer_groups.of_arch(arch))
    assert f"{len(found.groups)} layer groups, {found.width} features" in title
    assert len(lines) == len(found.body)
    names = [name for name, _ in found.body.named_children()]
    starts = {names[start]: len(found.groups) - i for i, start in enumerate(found.groups)}
    total = 0.0
    for name, line in zip(names, lines, strict=True):
        row = re.fullmatch(rf" *(\d*)  +(0\.\d+)? *  {name} +\w+ +({NUMBER})  ([0-9x ]+)", line)
        assert row, line
        assert row[1] == str(starts.get(name, "")), line
        total += count(row[3])
    real = sum(p.numel() for p in found.body.parameters())
    assert total == pytest.approx(real, rel=0.01)
    assert lines[-1].endswith(f"  {found.width}") or f"  {found.width} x " in lines[-1]
    column = head.index("output")
    assert {line[column - 1] for line in lines} == {" "}
    assert all(line[column].isdigit() for line in lines)


@pytest.mark.parametrize(
    "arch", ["resnet18", "mobilenet_v2", "vit_b_16", "densenet201", "vgg19_bn"]
)
def test_a_share_that_is_shown_trains_from_its_layer_on(arch):
    body = backbones.build_on_meta(arch, {}).body
    _, _, _, *lines = layer_groups.describe(layer_groups.of_arch(arch))
    shown = {line.split("  0.")[1].split()[0]: i for i, line in enumerate(lines) if "  0." in line}
    assert len(shown) > 3
    for digits, index in shown.items():
        assert freezing.share_start(body, float(f"0.{digits}")) == index


def test_a_stages_line_agrees_with_freezing():
    classifier = create_classifier("mobilenet_v2", layer_groups.CLASSES)
    _, _, _, *lines = layer_groups.stages(recipe())
    assert len(lines) == 2
    for line, unfreeze in zip(lines, (0, 2), strict=True):
        classifier.freeze(unfreeze, batchnorm="train")
        trains = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
        shown = re.search(rf"head +({NUMBER})", line)
        assert count(shown[1]) == pytest.approx(trains, rel=0.01)
        for name, _ in classifier.trainable_groups():
            assert name in line
    assert "52 fixed" in lines[0]
    assert "0..18: 2560, 1 views" in lines[0]
    assert "18 fixed, 34 trained" in lines[1]
    assert "0..6: 32 x 8 x 8, 1 views" in lines[1]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"frozen_batchnorm": "stats"}, "52 whose statistics move"),
        ({"frozen_batchnorm": "train"}, "52 trained"),
        ({"unfreeze": "all"}, "52 with fixed statistics"),
        ({"views": 0}, "none: views = 0"),
        ({"augment": {"mixup": 0.2}}, "none: photos are mixed"),
        ({"unfreeze": ["17.*"]}, "0..16: "),
    ],
)
def test_batchnorm_modes_and_cached_outputs_are_described_in_words(values, text):
    assert text in layer_groups.stages(recipe(stage=[{"name": "one", **values}]))[-1]


def test_random_weights_are_not_frozen():
    assert "14..18, head" in layer_groups.stages(recipe(weights="none"))[-2]
    assert "0..1, 2..3, " in layer_groups.stages(recipe(weights="none"))[-2]


def test_every_architecture_is_listed_once():
    words = " ".join(layer_groups.families()).split()
    assert all(words.count(name) == 1 for name in backbones.names())
    assert [words.index(f"resnet{depth}") for depth in (18, 34, 50, 101, 152)] == sorted(
        words.index(f"resnet{depth}") for depth in (18, 34, 50, 101, 152)
    )


def test_the_layers_command_prints_names_groups_and_stages(tmp_path, capsys):
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\narch = "resnet18"\n[[stage]]\nname = "only"\n')
    assert fledge.main(["layers"]) == 0
    assert "ResNet " in capsys.readouterr().out
    assert fledge.main(["layers", "squeezenet1_1"]) == 0
    assert "squeezenet1_1 (SqueezeNet)" in capsys.readouterr().out
    assert fledge.main(["layers", "--recipe", str(path), "stage.only.unfreeze=1"]) == 0
    assert re.search(r"only +layer4, head ", capsys.readouterr().out)
    assert fledge.main(["layers", "squeezenet1_1", "--recipe", str(path)]) == 0
    out = capsys.readouterr().out
    assert "squeezenet1_1 (SqueezeNet)" in out
    assert "only" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet19"], "did you mean 'resnet18'"),
        (["resnet18", "seed=3"], "--recipe FILE"),
    ],
)
def test_errors_of_the_layers_command_are_one_line(words, message, capsys):
    assert fledge.main(["layers", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(OptionError, match=r"preprocess\.size = 64 does not fit vit_b_16: use 224"):
        layer_groups.describe(recipe(arch="vit_b_16"))
