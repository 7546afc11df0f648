"""Suggestions for unknown options: each one is applied, and the recipe accepts it."""

import re
import shlex
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

import fledge
from serving.errors import OptionError
from training.config import load, other_tools
from training.engine import plan

SHIPPED = ("quick", "dogs-vs-cats", "tricks")


def refused(recipe, *changes):
    with pytest.raises(OptionError) as caught:
        load.read(Path(recipe), changes)
    return str(caught.value)


def told(message):
    """The overrides that a message suggests, as a shell reads them."""
    found = re.search(r"did you mean (.*?)\?(?: \(|$)", message)
    return [shlex.split(word)[0] for word in found[1].split(" or ")] if found else []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("epochs=10", ["stage.head.epochs=10", "stage.tail.epochs=10"]),
        ("num_epochs=10", ["stage.head.epochs=10", "stage.tail.epochs=10"]),
        ("cycle_len=1", ["stage.head.cycle_len=1", "stage.tail.cycle_len=1"]),
        ("lr=0.01", ["stage.head.lr=0.01", "stage.tail.lr=0.01"]),
        ("lr0=0.01", ["stage.head.lr=0.01", "stage.tail.lr=0.01"]),
        ("optimizer.lr=0.01", ["stage.head.lr=0.01", "stage.tail.lr=0.01"]),
        ("learning_rate=0.01", ["stage.head.lr=0.01", "stage.tail.lr=0.01"]),
        ("lrf=0.01", ["stage.head.floor=0.01", "stage.tail.floor=0.01"]),
        ("imgsz=320", ["preprocess.size=320"]),
        ("image_size=320", ["preprocess.size=320"]),
        ("input_size=[3, 320, 320]", ["preprocess.size=320"]),
        ("target_size=(320, 320)", ["preprocess.size=320"]),
        ("stage.tail.size=320", ["stage.tail.image_size=320"]),
        ("crop_mode=squash", ["preprocess.fit=squish"]),
        ("crop_mode=border", ["preprocess.fit=pad"]),
        ("preprocess.crop_mode=center", ["preprocess.fit=crop"]),
        ("resize_method=ResizeMethod.Pad", ["preprocess.fit=pad"]),
        ("letterbox=true", ["preprocess.fit=pad"]),
        ("crop_to_aspect_ratio=false", ["preprocess.fit=squish"]),
        ("preprocess.fit=squash", ["preprocess.fit=squish"]),
        ("fit=pad", ["preprocess.fit=pad"]),
        ("batch=16", ["batch_size=16"]),
        ("batch=-1", ["batch_size=auto"]),
        ("batch=1", ["batch_size"]),
        ("bs=16", ["batch_size=16"]),
        ("batch-size=16", ["batch_size=16"]),
        ("model=ResNet50", ["arch=resnet50"]),
        ("backbone=resnet50", ["arch=resnet50"]),
        ("optimizer=Adam", ["optimizer.kind=adam"]),
        ("opt=sgd", ["optimizer.kind=sgd"]),
        ("augment.flip=true", ["augment.flip=horizontal"]),
        ("optimizer.kind=AdamW", ["optimizer.kind=adamw"]),
        ("preprocess.mean=(0.5, 0.5, 0.5)", ["preprocess.mean=[0.5, 0.5, 0.5]"]),
        ("stage.tail.unfreeze=[15.*]", ['stage.tail.unfreeze=["15.*"]']),
        ("name=my été", ["name=my-ete"]),
        ("stages.head.lr=0.1", ["stage.head.lr=0.1"]),
        ("stage[1].lr=0.1", ["stage.tail.lr=0.1"]),
        ("training.epochs=3", ["stage.head.epochs=3", "stage.tail.epochs=3"]),
        ("optimizer=lamb", ["optimizer.kind"]),
        ("wd=0.1", ["optimizer.weight_decay=0.1"]),
        ("weight_decay=0.1", ["optimizer.weight_decay=0.1"]),
        ("momentum=0.95", ["optimizer.momentum=0.95"]),
        ("sched=OneCycle", ["stage.head.schedule=one_cycle", "stage.tail.schedule=one_cycle"]),
        ("fit_one_cycle=5", ["stage.head.schedule=one_cycle", "stage.tail.schedule=one_cycle"]),
        ("cos_lr=true", ["stage.head.schedule=cosine", "stage.tail.schedule=cosine"]),
        ("patience=3", ["stage.head.patience=3", "stage.tail.patience=3"]),
        ("smoothing=0.2", ["label_smoothing=0.2"]),
        ("hsv_h=0.015", ["augment.max_hue=0.015"]),
        ("stage.tail.hue=0.1", ["stage.tail.augment.max_hue=0.1"]),
        ("mixup=0.2", ["augment.mixup=0.2"]),
        ("stage.tail.cutmix=0.5", ["stage.tail.augment.cutmix=0.5"]),
        ("dropout=0.3", ["head.dropout=0.3"]),
        ("head=linear", ["head.kind=linear"]),
        ("tta=4", ["tta.count=4"]),
        ("random_state=42", ["seed=42"]),
        ("pretrained=true", ["weights=imagenet"]),
        ("pretrained=False", ["weights=none"]),
        ("freeze=true", ["stage.head.unfreeze=0", "stage.tail.unfreeze=0"]),
        ("freeze=10", ["stage.head.unfreeze", "stage.tail.unfreeze"]),
        ("experiment=birds", ["name=birds"]),
        ("run_name=2024", ["name=2024"]),
        ("weigths=my file.pth", ["weights=my file.pth"]),
        ("weigths=it's.pth", ["weights=it's.pth"]),
        ("valid_pct=0.1", ["data.valid=0.1"]),
        ("batch_sise=8", ["batch_size=8"]),
        ("augmnt.flip=none", ["augment.flip=none"]),
        ("stage.head.shedule=cosine", ["stage.head.schedule=cosine"]),
        ("stage.haed.lr=0.1", ["stage.head.lr=0.1"]),
    ],
)
def test_a_suggestion_is_written_as_it_must_be_written(given, meant):
    message = refused("quick", given)
    assert told(message) == meant, message
    for word in meant:
        if "=" in word:
            load.read(Path("quick"), [word])


@pytest.mark.parametrize("recipe", SHIPPED)
@pytest.mark.parametrize("value", ["1", "8", "0.1", "true", "none", "resnet50", "[1, 2]", "-1"])
def test_every_suggestion_for_words_of_other_tools_is_accepted(recipe, value):
    suggested = 0
    for word in other_tools.WORDS:
        try:
            load.read(Path(recipe), [f"{word}={value}"])
        except OptionError as error:
            for assignment in told(str(error)):
                if "=" in assignment:
                    suggested += 1
                    load.read(Path(recipe), [assignment])
    assert suggested > 5


ODD = (
    "[[1], [1]]",
    "[{a=1}]",
    "{a=1}",
    "{a={b=1}}",
    "nan",
    "1e999",
    "2024-01-01",
    "",
    "'",
    "9" * 60,
)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize(
    "table", ["", "stage.head.", "stages.head.", "augment.", "x.", "stage[0]."]
)
def test_odd_values_of_other_tools_words_are_refused_in_lines(table, value):
    for word in list(other_tools.WORDS)[len(value) % 8 :: 8]:
        with suppress(OptionError):  # nothing else, such as a TypeError
            load.read(Path("quick"), [f"{table}{word}={value}"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("device=0", "write --device cuda on the command line"),
        ("save_dir=my runs", "write --out 'my runs' on the command line"),
        ("project=out", "write --out out on the command line"),
        ("data=photos", "write --data photos on the command line"),
        ("data_dir=photos", "write --data photos on the command line"),
        ("workers=8", "all cores that the process may use are used: leave it out"),
        ("num_classes=3", "the photos determine the classes: leave it out"),
        ("drop_path=0.1", "arch_args.stochastic_depth_prob"),
        ("verbose=true", "leave it out"),
    ],
)
def test_what_is_no_option_of_the_recipe_is_said(given, text):
    assert text in refused("quick", given)


def test_epochs_is_another_word_for_cycle_len_where_a_stage_has_one_cycle():
    stages = load.read(Path("quick"), ["stage.head.epochs=4", "stage.tail.epochs=9"]).stage
    assert [(stage.cycle_len, stage.epochs) for stage in stages] == [(4, 4), (9, 9)]
    # The last of several overrides counts, as for every option.
    read = load.read(Path("quick"), ["stage.head.epochs=4", "stage.head.cycle_len=7"])
    assert read.stage[0].cycle_len == 7
    read = load.read(Path("quick"), ["stage.head.cycle_len=7", "stage.head.epochs=4"])
    assert read.stage[0].cycle_len == 4
    message = refused("dogs-vs-cats", "stage.head.epochs=4")
    assert "stage.head.epochs: the stage has 3 cycles; set stage.head.cycle_len" in message
    read = load.read(Path("dogs-vs-cats"), ["stage.head.epochs=4", "stage.head.cycles=1"])
    assert read.stage[0].epochs == 4
    assert told(refused("dogs-vs-cats", "epochs=4")) == [
        "stage.head.cycle_len",
        "stage.all.cycle_len",
    ]


def test_epochs_in_a_file(tmp_path):
    path = tmp_path / "r.toml"
    text = 'name = "x"\narch = "resnet18"\n[[stage]]\nname = "a"\nepochs = 3\n'
    path.write_text(text)
    assert load.read(path).stage[0].cycle_len == 3
    path.write_text(text + "cycle_len = 2\n")
    assert "line 5: stage.a.epochs is another word for cycle_len" in refused(path)
    path.write_text(text.replace("3", "0"))
    assert "line 5: stage.a.cycle_len = 0: must be greater than or equal to 1" in refused(path)
    path.write_text(text.replace("3", "3\ncycles = 2"))
    assert "line 5: stage.a.epochs: the stage has 2 cycles" in refused(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("epochs = 5", "'cycle_len = 5' in stage.a"),
        ("lr0 = 0.1", "'lr = 0.1' in stage.a"),
        ("imgsz = 96", "'size = 96' under [preprocess]"),
        ("bs = 8", "'batch_size = 8'?"),
        ('pretrained = "my.pth"', "'weights = \"my.pth\"'?"),
        ('optimizer = "adam"', "'kind = \"adam\"' under [optimizer]"),
    ],
)
def test_a_suggestion_for_a_file_is_a_line_of_the_file(tmp_path, text, line):
    path = tmp_path / "r.toml"
    rest = 'name = "x"\narch = "resnet18"\n[[stage]]\nname = "a"\n'
    path.write_text(f"{text}\n{rest}")
    message = refused(path)
    assert f"did you mean {line}" in message
    assert "line 1: " in message
    found = re.search(r"did you mean '(.*?)'(?: under \[(\w+)\]| in stage\.a)?\?", message)
    before = rest.partition("[[")[0]
    pasted = {
        None: f"{found[1]}\n{rest}" if "stage.a" not in found[0] else f"{rest}{found[1]}\n",
    }.get(found[2], f"{before}[{found[2]}]\n{found[1]}\n{rest.removeprefix(before)}")
    tomllib.loads(pasted)
    path.write_text(pasted)
    load.read(path)


@pytest.mark.parametrize("name", ["2024", "2024-01-01", "1e5", "007", "true", "12:30:00.5"])
def test_text_stays_text(name):
    if ":" not in name:
        assert load.read(Path("quick"), [f"name={name}"]).name == name
    assert load.read(Path("quick"), [f"weights={name}"]).weights == name
    changes = ["data.csv=t.csv", f"data.suffix={name}"]
    assert load.read(Path("quick"), changes).data.suffix == name
    assert load.read(Path("quick"), [f'weights="{name}"']).weights == name


def test_text_in_a_file_needs_quotes_which_is_said(tmp_path):
    path = tmp_path / "r.toml"
    for value in ("2024", "2024-01-01", "true", "12:30:00"):
        path.write_text(f'name = {value}\narch = "resnet18"\n[[stage]]\nname = "a"\n')
        shown = {"true": "True"}.get(value, value)
        assert f'name = {shown}: text needs quotes: name = "{shown}"' in refused(path)


def test_mistakes_of_the_network_are_told_with_all_others():
    changes = ["epochs=3", "stage.tail.unfreeze=['15.*']", "stage.head.groups=9", "seed=-1"]
    with pytest.raises(OptionError) as caught:
        load.read(Path("quick"), [*changes, "arch=squeezenet1_1"], plan.mistakes)
    message = str(caught.value)
    assert "quick has 4 mistakes" in message
    assert "seed = -1" in message
    assert "stage.tail.unfreeze: '15.*' matches no parameter" in message
    assert "stage head: groups = 9, but only 1 train" in message


def test_a_suggested_network_exists_and_a_suggested_size_fits_it():
    def message(*changes):
        with pytest.raises(OptionError) as caught:
            load.read(Path("quick"), changes, plan.mistakes)
        return str(caught.value)

    assert told(message("model=yolov8n-cls.pt")) == ["arch"]
    assert "`fledge layers` lists the networks" in message("model=yolov8n-cls.pt")
    assert told(message("model=resnet18")) == ["arch=resnet18"]
    assert told(message("arch=vit_b_16", "imgsz=320")) == ["preprocess.size"]
    assert told(message("arch=vit_b_16", "imgsz=224")) == ["preprocess.size=224"]


@pytest.mark.parametrize(
    "words",
    [
        [
            "train",
            "quick",
            "--data",
            "/nowhere",
            "arch=squeezenet1_1",
            "stage.tail.unfreeze=['9x']",
        ],
        ["train", "quick", "--data", "flowers102", "stage.tail.unfreeze=['9x']"],
        ["lr-find", "quick", "--data", "/nowhere", "stage.tail.unfreeze=['9x']"],
    ],
)
def test_mistakes_of_the_recipe_come_before_the_photos(words, capsys):
    assert fledge.main(words) == 2
    assert "stage.tail.unfreeze: '9x' matches no parameter" in capsys.readouterr().err
