"""The shipped recipes: each is valid, has its command in the header, and runs."""

import csv
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import torchvision

import fledge
from tests.training.conftest import BLOCKS, coloured
from training.config import load, overrides, sections
from training.engine import finetune, plan
from training.models import backbones
from training.models.classifier import create_classifier
from training.optim.optimizer import build_optimizer
from training.run import checkpoint

FOLDER = Path("training/recipes")
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
MOBILE = (
    "arch=mobilenet_v2", "arch_args.width_mult=0.25",
    f"arch_args.inverted_residual_setting={BLOCKS}", "weights=w.pth", "preprocess.size=32",
    "batch_size=4", "tta.count=2",
)  # fmt: skip
COUNTS = {"Abyssinian": 6, "great_pyrenees": 6, "pug": 6}
"""Photos of each class; each class has one colour."""

TINY = {
    "demo": (
        "preprocess.size=32", f"arch_args.inverted_residual_setting={BLOCKS}",
        "stage.all.cycle_len=1", "tta.count=2",
    ),
    "dog-breeds": (
        *MOBILE, "stage.larger.image_size=40", "stage.longer.image_size=40",
        "stage.plain.cycle_len=1", "stage.augmented.cycles=1", "stage.larger.cycles=1",
        "stage.longer.cycles=1",
    ),
    "dogs-vs-cats": (*MOBILE, "stage.head.cycles=1", "stage.all.cycles=1"),
    "flowers": (
        *MOBILE, "stage.head.cycles=1", "stage.block.cycles=1",
    ),
    "pets": (*MOBILE, "stage.head.cycle_len=1", "stage.all.cycle_len=1"),
    "quick": (
        *MOBILE, "stage.head.cycle_len=1", "stage.head.lr=0.01", "stage.tail.cycle_len=1",
    ),
    "tricks": (*MOBILE, "stage.all.cycle_len=1"),
}  # fmt: skip


def layout(name, root):
    """Make the folder layout that the recipe's header describes; returns the value of --data."""
    photos = coloured(root / "classes", COUNTS)
    if name in ("flowers", "dogs-vs-cats"):
        photos.rename(root / "train")
        coloured(root / "valid", dict.fromkeys(COUNTS, 2))
        return root
    if name == "pets":
        for path in sorted(photos.rglob("*.jpg")):
            path.rename(photos / f"{path.parent.name}_{path.stem}.jpg")
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    if name == "dog-breeds":
        (root / "train").mkdir()
        (root / "test").mkdir()
        with (root / "labels.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["id", "breed"])
            for number, path in enumerate(sorted(photos.rglob("*.jpg"))):
                out.writerow([f"{number:04x}", path.parent.name])
                path.rename(root / "train" / f"{number:04x}.jpg")
        for path in (root / "train").glob("*f.jpg"):
            (root / "test" / f"x{path.name}").write_bytes(path.read_bytes())
        return root
    return photos


def test_every_shipped_recipe_has_a_miniature():
    assert {"flowers", "pets", "dogs-vs-cats", "dog-breeds", "tricks", "quick"} <= set(NAMES)
    assert set(TINY) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_is_valid_and_has_its_command_in_the_header(name):
    path = FOLDER / f"{name}.toml"
    assert load.read(path).name == name
    header = path.read_text().partition("\nname =")[0]
    commands = [line[1:].strip() for line in header.splitlines() if line.startswith("#   fledge ")]
    assert commands
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "fledge"
        given, rest = fledge._parser().parse_known_args(words[1:])
        assert (str(given.recipe), given.overrides, rest) == (name, [], [])
        assert given.data


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_fits_its_network(name):
    """Check sizes, patterns and rates against the real architecture, without its weights."""
    read = load.read(FOLDER / f"{name}.toml")
    classes = {"flowers": 102, "pets": 37, "dog-breeds": 120}.get(name, 2)
    with torch.device("meta"):
        backbone = backbones.build(read.arch, read.arch_args)
        network = create_classifier(read.arch, classes, arch_args=read.arch_args, head=read.head)
        plan.check(network, read, plan.stages_of(read, pretrained=True))
    widths = [layer.in_features for layer in network.head if isinstance(layer, torch.nn.Linear)]
    if name == "flowers":
        assert widths == [4416, 1024]
        dropouts = [layer.p for layer in network.head if isinstance(layer, torch.nn.Dropout)]
        assert dropouts == [0.35, 0.35]  # half of one number would be used before the first Linear
    assert widths[0] == backbone.width * (2 if read.head.kind == "concat_pool" else 1)


@pytest.mark.parametrize(
    ("name", "stage", "patterns"),
    [("quick", "tail", ["15.*", "16.*", "17.*", "18.*"]), ("flowers", "block", ["denseblock4.*"])],
)
def test_layers_by_position_are_those_that_were_named(name, stage, patterns):
    """The recipes named layers of one network; its results must stay the same to the bit."""
    read = load.read(Path(name))
    (own,) = (item for item in read.stage if item.name == stage)
    with torch.device("meta"):
        network = create_classifier(read.arch, 3, arch_args=read.arch_args, head=read.head)
    named = network.freezing_for(own.model_copy(update={"unfreeze": tuple(patterns)}))
    assert network.freezing_for(own) == named
    assert 0 < named.prefix < len(network.body)


OTHER_NETWORKS = ("squeezenet1_1", "resnet18", "alexnet", "vgg11_bn", "convnext_tiny", "swin_t")


@pytest.mark.parametrize("arch", OTHER_NETWORKS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_a_recipe_suits_any_network(name, arch):
    read = load.read(Path(name), [f"arch={arch}"])
    assert list(plan.mistakes(read)) == []


@pytest.mark.parametrize("arch", ["vit_b_16", "maxvit_t"])
def test_quick_suits_a_network_that_pools_by_itself(arch):
    assert list(plan.mistakes(load.read(Path("quick"), [f"arch={arch}"]))) == []


def rates(name, stage):
    """Parameter -> rate of all parameters that a stage trains."""
    read = load.read(FOLDER / f"{name}.toml")
    stage = next(item for item in read.stage if item.name == stage)
    with torch.device("meta"):
        network = create_classifier(read.arch, 3, arch_args=read.arch_args, head=read.head)
    network.freeze(
        stage.unfreeze, batchnorm=stage.batchnorm, frozen_batchnorm=stage.frozen_batchnorm
    )
    groups = build_optimizer(network, read.optimizer, stage, stage.lr).param_groups
    rate = {id(p): group["base_lr"] for group in groups for p in group["params"]}
    return {key: rate[id(p)] for key, p in network.named_parameters() if id(p) in rate}


def test_learning_rates_equal_those_of_the_sources():
    flowers = rates("flowers", "block")
    assert {key.split(".")[1] for key in flowers if key.startswith("body")} == {"denseblock4"}
    assert {v for k, v in flowers.items() if k.startswith("body")} == {0.02 / 50}
    assert {v for k, v in flowers.items() if k.startswith("head")} == {0.02 / 2}
    pets = set(rates("pets", "all").values())
    assert sorted(pets) == pytest.approx([1e-6, 10**-5.5, 1e-5])
    assert sorted(set(rates("dogs-vs-cats", "all").values())) == [1e-4, 1e-3, 1e-2]
    tricks = rates("tricks", "all")
    assert {v for k, v in tricks.items() if k.startswith("body")} == {1e-3 / 100}
    assert {v for k, v in tricks.items() if k.startswith("head")} == {1e-3}


@pytest.fixture
def one_thread():
    """One thread is fastest for batches of four photos."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_trains_on_a_miniature_data_set(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = load.read(FOLDER / f"{name}.toml", TINY[name])
    if read.weights == "w.pth":
        weights = tmp_path / "w.pth"
        network = torchvision.models.get_model(read.arch, weights=None, **read.arch_args)
        torch.save(network.state_dict(), weights)
        read = read.model_copy(update={"weights": str(weights)})
    folder = finetune.run(
        read, str(layout(name, tmp_path / "photos")), out=tmp_path / "run", device="cpu",
        log=lambda line: None,
    )  # fmt: skip
    info = checkpoint.read_info(folder / "best.json")
    assert info.classes == tuple(COUNTS)
    photos = {"flowers": (18, 6), "dogs-vs-cats": (18, 6), "pets": (9, 9)}.get(name, (15, 3))
    assert (info.data["train"], info.data["valid"]) == photos
    assert 0 <= info.metrics["accuracy"] <= 1
    assert ("accuracy_tta" in info.metrics) == (read.tta.count > 0)
    epochs = (folder / "metrics.csv").read_text().splitlines()[1:]
    assert len(epochs) == sum(stage.epochs for stage in read.stage)


def technique_rows():
    page = Path("docs/recipe.md").read_text().partition("## Every technique")[2]
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in re.findall(r"^\| [^-].*\|$", page, re.MULTILINE)
    ][1:]


def test_the_table_of_techniques_lists_every_option():
    defaults = {}
    for name, section in overrides.SECTIONS.items():
        if name in ("preprocess", "stage.lr", "stage.augment"):
            continue
        filled = sections.AugmentConfig().model_dump() if name == "augment" else {}
        for key, field in section.model_fields.items():
            default = filled.get(key, field.get_default(call_default_factory=True))
            default = list(default) if isinstance(default, tuple) else default
            defaults[f"{name}.{key}".lstrip(".")] = default
    documented = set()
    for technique, option, *rest in technique_rows():
        assert rest[0], technique
        names = re.findall(r"`([a-z][a-z_.0-9]+)`", option)
        stated = re.findall(r"`([^`]*)`", rest[1]) if len(rest) > 1 else []
        values = [tomllib.loads(f"v = {text}")["v"] for text in stated]
        assert values == [defaults[name] for name in names], technique
        documented |= set(names)
    plain = {"name", "arch", "arch_args", "seed", "batch_size", "stage.name", "stage"}
    plain |= {"data.columns", "data.images", "data.suffix", "data.similar", "data.group"}
    plain |= {"data.layout", "data.synsets"} | set(overrides.SECTIONS)
    assert defaults.keys() - documented - plain == set()
