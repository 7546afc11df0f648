import re
from pathlib import Path

import pytest

from serving.errors import OptionError
from serving.imaging.preprocess import DECODES, FITS, Preprocess
from tests.training.conftest import coloured
from training.cli.options import check_network
from training.config import load, overrides, suggestions
from training.data.dataset import load_dataset
from training.run.folder import RunInfo, start_run

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


def test_omitted_options_have_defaults_and_cycles_give_the_epochs(recipe):
    read = load.read(recipe)
    assert [s.epochs for s in read.stage] == [1, 7]
    assert read.stage[1].unfreeze >= 99
    assert read.stage[1].lr == "find"
    assert read.preprocess.size == 224
    assert read.data.presize == 1.5


RECORDED = """
[preprocess]
size = 96
crop = 0.9
interpolation = "bicubic"
mean = [0.5, 0.5, 0.5]
std = [0.2, 0.2, 0.2]
background = [1, 2, 3]
"""


def test_recipes_decode_scaled_and_recorded_recipes_as_their_runs_did(recipe):
    assert load.read(recipe).preprocess == Preprocess(decode="scaled")
    for override in ("preprocess.size=96", "preprocess.crop=1", "preprocess.fit=pad"):
        assert load.read(recipe, [override]).preprocess.decode == "scaled"
    assert load.read(recipe, ["arch=googlenet"]).preprocess.decode == "scaled"
    assert load.read(recipe, ["preprocess.decode=full"]).preprocess == Preprocess()
    # A recipe that a run recorded before `decode` existed has all other fields.
    recipe.write_text(GOOD + RECORDED)
    read = load.read(recipe)
    assert (read.preprocess.decode, read.preprocess.fit) == ("full", "crop")
    assert load.read(recipe, ["preprocess.decode=scaled"]).preprocess.decode == "scaled"


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("fit", FITS)
def test_a_run_records_how_its_photos_become_squares(recipe, tmp_path, decode, fit):
    coloured(tmp_path / "photos", {"blue": 5, "red": 5})
    read = load.read(recipe, [f"preprocess.decode={decode}", f"preprocess.fit={fit}"])
    (tmp_path / "run").mkdir()
    dataset = load_dataset(str(tmp_path / "photos"))
    info = RunInfo("photos", "photos", "", dataset.classes, False, "cpu", {})
    start_run(tmp_path / "run", read, dataset, info)
    recorded = load.read(tmp_path / "run" / "recipe.toml")
    assert recorded.preprocess == read.preprocess == Preprocess(decode=decode, fit=fit)


@pytest.mark.parametrize(("option", "words"), [("decode", DECODES), ("fit", FITS)])
def test_an_unknown_word_of_preprocess_is_an_error_with_the_words(recipe, option, words):
    expected = f"use {', '.join(words)}; did you mean '{words[-1]}'?"
    with pytest.raises(OptionError, match=re.escape(expected)):
        load.read(recipe, [f"preprocess.{option}={words[-1]}s"])


def test_overrides_set_options_at_every_level(recipe):
    read = load.read(
        recipe,
        ["batch_size=8", "stage.head.lr=0.5", "preprocess.size=96", "arch_args.width_mult=0.5",
         "weights=some/path.pth"],
    )  # fmt: skip
    assert (read.batch_size, read.stage[0].lr, read.preprocess.size) == (8, 0.5, 96)
    assert read.arch_args == {"width_mult": 0.5}
    assert read.weights == "some/path.pth"


def mistakes(path, text="", changes=()):
    """The errors of a file with this text, or with these overrides."""
    if text:
        path.write_text(text)
    with pytest.raises(OptionError) as caught:
        load.read(path, changes, check_network)
    head, *lines = str(caught.value).split("\n  ")
    if not lines:
        assert head.startswith(f"{path}: ")
        return head.removeprefix(f"{path}: ")
    assert head == f"{path} has {len(lines)} mistakes:"
    return "\n".join(lines)


WRONG = """
name = "x y"
arch = "resnet19"
batch_sise = 8
size = 96
preprocess = { size = 3, sise = 4, interpolation = "biliner" }
[[stage]]
name = "head"
lr = { lo = 1, high = -2 }
schedul = "sgdr"
schedule = "cosin"
unfreeze = "gradul"
[stage.augment]
max_rotat = 3
flip = "horizntal"
[[stage]]
name = "head"
lr = [
  0.1,
  -1,
]
unfreeze = -1
cycles = "x"
[head]
kind = "linaer"
dropout = 1.5
hidden = 0
[data]
columns = ["id"]
pattern = "abc"
[optimiser]
kind = "sgd"
[lr_find]
low = 3
high = 1
"""


def test_all_errors_are_reported_with_line_and_nearest_name(recipe):
    lr = (
        "use 'find', a number above 0, a list with one for each group, "
        "or { low = 1e-5, high = 1e-3 }"
    )
    unfreeze = (
        "use a number of layer groups, a share of the layers such as 0.2, 'all', 'gradual', "
        "or a list of patterns such as ['layer4.*']"
    )
    schedules = (
        "'sgdr', 'cosine', 'one_cycle', 'triangular', 'triangular2', 'exp_range', 'cyclical', "
        "'step', 'plateau' or 'constant'"
    )
    assert mistakes(recipe, WRONG, ["tta.kind=view", "stage.heed.lr=1", "nonsense"]).split(
        "\n"
    ) == [
        "line 2: name = 'x y': use letters, digits, '.', '_' and '-'; "
        "did you mean 'name = \"x-y\"'?",
        "line 3: arch = 'resnet19' is unknown: did you mean 'resnet18'?",
        "line 4: batch_sise is unknown; did you mean 'batch_size = 8'?",
        "line 5: size is unknown; did you mean 'size = 96' under [preprocess]?",
        "line 6: preprocess.size = 3: use 8 to 4096 pixels",
        "line 6: preprocess.sise is unknown; did you mean 'size'?",
        "line 6: preprocess.interpolation = 'biliner': use bilinear, bicubic, lanczos; "
        "did you mean 'bilinear'?",
        "line 9: stage.head.lr.low is missing",
        "line 9: stage.head.lr.high = -2: must be greater than 0",
        "line 9: stage.head.lr.lo is unknown; did you mean 'low'?",
        "line 10: stage.head.schedul is unknown; did you mean 'schedule = \"sgdr\"'?",
        f"line 11: stage.head.schedule = 'cosin': use {schedules}; did you mean 'cosine'?",
        f"line 12: stage.head.unfreeze = 'gradul': {unfreeze}; did you mean 'gradual'?",
        "line 14: stage.head.augment.max_rotat is unknown; did you mean 'max_rotate = 3'?",
        "line 15: stage.head.augment.flip = 'horizntal': use 'none', 'horizontal' or 'dihedral'; "
        "did you mean 'horizontal'?",
        "line 17: stage names must differ, 'head' is there twice",
        f"line 18: stage.head.lr = [0.1, -1]: {lr}",
        f"line 22: stage.head.unfreeze = -1: {unfreeze}",
        "line 23: stage.head.cycles = 'x': must be a valid integer",
        "line 25: head.kind = 'linaer': use 'concat_pool', 'deep' or 'linear'; "
        "did you mean 'linear'?",
        "line 26: head.dropout = 1.5: use a share in [0, 1), or a list with one for every "
        "Linear layer",
        "line 27: head.hidden = 0: use a width or a list of widths, each at least 1",
        "line 29: data.columns = ['id']: use the names of two columns, of the id and of the label",
        "line 30: data.pattern = 'abc': put the label in parentheses, as in '([a-zA-Z_]+)_[0-9]+'",
        "line 31: optimiser is unknown; did you mean 'optimizer'?",
        "line 33: lr_find: low = 3.0 must be below high = 1.0",
        "on the command line: tta.kind = 'view': use 'views', 'flip', 'five_crop', 'multi_scale' "
        "or 'draws'; did you mean 'views'?",
        "on the command line: 'stage.heed.lr=1': no stage 'heed'; the recipe has head, head; "
        "did you mean 'stage.head.lr=1'?",
        "on the command line: 'nonsense': use key=value, such as stage.head.lr=0.01",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.tail.lr=1", "no stage 'tail'; the recipe has head, all"),
        ("nonsense", "use key=value"),
        ("stage.lr=1", "name the stage, too: 'stage.head.lr=1' or 'stage.all.lr=1'"),
        ("stage.head=1", "name the option of the stage, too, such as stage.head.lr=1"),
        ("stage.head.unfreeze=some", "stage.head.unfreeze = 'some': use a number of layer groups"),
        ("arch.x=1", "arch is no section"),
        ("augment.scale=[2, 0.1]", "augment.scale = [2, 0.1]: use [smallest, largest]"),
        ("stage.all.augment={ scale = [2, 0.1] }", "stage.all.augment.scale = [2, 0.1]: use"),
        ("stage.all.augment=3", "stage.all.augment = 3: write a table [stage.all.augment]"),
        ("stage.all.cycle_mult=1e9", "stage.all.cycle_mult = 1000000000.0: must be less than"),
        ("stage.all.lr={ low = 1 }", "stage.all.lr.high is missing"),
        ("stage.all.lr=[]", "stage.all.lr = []: use 'find', a number above 0"),
        ("stage=3", "stage = 3: write a table [[stage]] for each"),
        ("stage=[1]", "stage = [1]: write a table [[stage]] for each"),
        ("head=linear", "it is a table of options; did you mean 'head.kind=linear'?"),
        ("head=2024-01-01", "head = 2024-01-01: it is a table of options"),
        ("preprocess=3", "preprocess = 3: "),
        ("head.dropout=[0.1, 0.2, 0.3]", "head: dropout has 3 values for 2 Linear layers"),
        ("name=latest", "name = 'latest' is reserved for the link runs/latest"),
        ("data.folds=1", "data: folds = 1: use 2 or more"),
        ("lr=0.1", "lr is unknown; did you mean 'stage.head.lr=0.1' or 'stage.all.lr=0.1'?"),
        ("stage.all.views=some", "stage.all.views = 'some': use a number, 0 or more, or 'auto'"),
        ("stage.all.views=-1", "stage.all.views = -1: use a number, 0 or more, or 'auto'"),
        ("compile=cuda_graph", "or 'cuda_graphs'; did you mean 'cuda_graphs'?"),
        ("stage.all.lr=fin", "or { low = 1e-5, high = 1e-3 }; did you mean 'find'?"),
        ("batch_size=1", "batch_size = 1: must be greater than or equal to 2"),
        ("augmnt.flip=none", "augmnt is unknown; did you mean 'augment.flip=none'?"),
    ],
)
def test_an_invalid_override_is_an_error_that_names_the_command_line(recipe, override, message):
    text = mistakes(recipe, changes=[override])
    assert text.startswith("on the command line: ")
    assert message in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "0.5: must be greater than or equal to 1"),
        ("4.1", "4.1: must be less than or equal to 4"),
        ("nan", "nan: must be a finite number"),
        ('"big"', "'big': must be a valid number"),
    ],
)
def test_an_invalid_presize_is_refused(recipe, value, message):
    assert mistakes(recipe, f"{GOOD}[data]\npresize = {value}\n") == (
        f"line 13: data.presize = {message}"
    )
    assert mistakes(recipe, GOOD, [f"data.presize={value}"]) == (
        f"on the command line: data.presize = {message}"
    )


def test_a_valid_override_replaces_an_invalid_line(recipe):
    recipe.write_text(GOOD.replace("lr = 0.01", "lr = -1"))
    assert mistakes(recipe).startswith("line 6: stage.head.lr = -1: use 'find'")
    assert load.read(recipe, ["stage.head.lr=1"]).stage[0].lr == 1


def test_an_unreadable_or_invalid_recipe_file_is_an_error_with_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "r.toml"
    for folder in (Path.cwd(), tmp_path):
        monkeypatch.chdir(folder)
        with pytest.raises(
            OptionError, match=r"no such recipe; use one of demo, .*quick, .*of your own$"
        ):
            load.read(path)
    with pytest.raises(OptionError) as caught:
        load.read(tmp_path)
    assert str(caught.value) == f"{tmp_path} is a folder, not a recipe"
    with pytest.raises(OptionError, match=r"^/dev/null/x: Not a directory$"):
        load.read(Path("/dev/null/x"))
    for twice, line in (('name = "x"\nname = "y"', 2), ("[[stage]]\nlr=1\n\nlr = 2", 4)):
        path.write_text(twice)
        key = twice.split("\n")[-1].split()[0]
        with pytest.raises(OptionError, match=rf"TOML file: {key} is there twice \(line {line}\)$"):
            load.read(path)
    path.write_text('name = "x"\narch = \nweights = "none"')
    with pytest.raises(OptionError, match=r"no TOML file: .*at line 2"):
        load.read(path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(OptionError, match="no TOML file"):
        load.read(path)
    assert mistakes(path, 'name = "x"') == "arch is missing\nstage is missing"
    assert mistakes(path, GOOD.replace('name = "all"', "")) == "line 7: stage.1.name is missing"
    assert mistakes(path, "stage = []\n" + GOOD.partition("[[")[0]) == (
        "line 1: stage = []: write a table [[stage]] for each, at least one"
    )


def test_every_option_has_a_nearest_name(recipe):
    for table in overrides.SECTIONS:
        for name in suggestions.names(table):
            if table == "stage.augment":
                key = f"stage.head.augment.{name}"
            elif table == "stage.lr":
                key = f"stage.head.lr.{name}"
            elif table == "stage":
                key = f"stage.head.{name}"
            else:
                key = f"{table}.{name}".lstrip(".")
            override = f"{key}_=1" if table != "stage.lr" else f"stage.head.lr={{ {name}_ = 1 }}"
            with pytest.raises(OptionError) as caught:
                load.read(recipe, [override])
            text = str(caught.value)
            shown = name if table == "stage.lr" else key
            assert f"{key}_ is unknown; did you mean '{shown}" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tta.count=50", "there are 10 fixed views"),
        ("stage.head.lr={low=1e-2,high=1e-4}", "must not be above high"),
        ("stage.head.warm_up=9", "longer than 1 epochs"),
        ("stage.head.scale='1/x'", "no effect with schedule = 'sgdr'"),
        ("stage.head.image_size=5", "use 8 or more"),
        ("stage.head.lr_divide={}", "lr_divide"),
        ('preprocess.interpolation=["bilinear"]', "use bilinear, bicubic, lanczos"),
    ],
)
def test_options_that_contradict_each_other_are_refused(recipe, override, message):
    with pytest.raises(OptionError, match=message):
        load.read(recipe, [override])


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = " + "[" * 5000, "a = " + "{a=" * 2000])
def test_a_text_that_no_parser_takes_is_no_toml(recipe, text):
    recipe.write_text(text)
    with pytest.raises(OptionError, match="is no TOML file: "):
        load.read(recipe)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000])
def test_an_override_that_no_parser_takes_is_a_text(recipe, text):
    assert load.read(recipe, [f"weights={text}"]).weights == text
