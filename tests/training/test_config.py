from pathlib import Path

import pytest

from serving.errors import OptionError
from training import config

RECIPES = sorted(Path("training/recipes").glob("*.toml"))
GOOD = """
name = "x"
arch = "resnet18"
[[stage]]
name = "head"
lr = 0.01
[[stage]]
name = "all"
unfreeze = "all"
cycles = 3
cycle_mult = 2
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run_them(path):
    assert config.read(path).name == path.stem
    assert f"fledge train {path.as_posix()}" in path.read_text()


def test_defaults_and_epochs(recipe):
    read = config.read(recipe)
    assert [s.epochs for s in read.stage] == [1, 7]
    assert read.stage[1].unfreeze >= 99
    assert read.stage[1].lr == "find"
    assert read.preprocess.size == 224


def test_overrides_reach_every_level(recipe):
    read = config.read(
        recipe,
        ["batch_size=8", "stage.head.lr=0.5", "preprocess.size=96", "arch_args.width_mult=0.5",
         "weights=some/path.pth"],
    )  # fmt: skip
    assert (read.batch_size, read.stage[0].lr, read.preprocess.size) == (8, 0.5, 96)
    assert read.arch_args == {"width_mult": 0.5}
    assert read.weights == "some/path.pth"


def test_all_mistakes_are_reported_together_in_one_line(recipe):
    with pytest.raises(OptionError) as caught:
        config.read(
            recipe,
            ["batch_sise=8", "stage.head.lr=-1", "preprocess.size=3", "head.kind=cnocat_pool",
             "augment.max_rotat=3"],
        )  # fmt: skip
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "batch_sise is unknown; did you mean 'batch_size'?",
        "stage.head.lr = -1",
        "size = 3",
        "head.kind = 'cnocat_pool'",
        "augment.max_rotat is unknown; did you mean 'max_rotate'?",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.tail.lr=1", "no stage 'tail'; the recipe has head, all"),
        ("nonsense", "use key=value"),
        ("stage.lr=1", "name the option too"),
        ("stage.head.unfreeze=some", "unfreeze"),
        ("arch.x=1", "arch is no section"),
        ("augment.scale=[2, 0.1]", "augment.scale"),
        ("stage.all.cycle_mult=1e9", "stage.all.cycle_mult"),
    ],
)
def test_bad_overrides(recipe, override, message):
    with pytest.raises(OptionError, match=message):
        config.read(recipe, [override])


def test_bad_files(tmp_path):
    with pytest.raises(OptionError, match=r"no such recipe.*quick"):
        config.read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("name = ")
    with pytest.raises(OptionError, match="no TOML file"):
        config.read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text('name = "x"')
    with pytest.raises(OptionError, match=r"arch is missing; stage is missing"):
        config.read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text(GOOD.replace('"all"\nun', '"head"\nun'))
    with pytest.raises(OptionError, match="stage names must differ"):
        config.read(tmp_path / "r.toml")
