"""What `fledge` says to words that it does not know, and to paths that are something else."""

import json
import re
import shlex

import pytest

import fledge
from serving import cli_hints
from serving.inputs import path_kind


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with a folder of photos, runs, a bundle and files of other kinds."""
    for folder in ("photos/ants", "bundle/v1", "runs/quick", "runs/cut/last", "my photos/bees"):
        (tmp_path / folder).mkdir(parents=True)
    for file in (
        *("photos/ants/1.jpg", "my photos/bees/1.jpg", "bundle/manifest.json", "table.csv"),
        *("bundle/manifest.sha256", "bundle/v1/model.onnx", "runs/quick/run.json", "photos.zip"),
        *("runs/quick/best.json", "runs/quick/best.safetensors", "runs/cut/run.json", "x.onnx"),
    ):
        (tmp_path / file).touch()
    run = {"source": "photos", "root": "/photos", "fingerprint": "0", "classes": ["ants"]}
    for name in ("quick", "cut"):
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(run))
    manifest = {key: {} for key in ("labels", "precisions", "preprocess", "graph")}
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "birds.toml").write_text('name = "b"\narch = "resnet18"\n[[stage]]\nname = "a"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *words):
    try:
        status = fledge.main(words)
    except SystemExit as error:
        status = error.code
    text = capsys.readouterr().err
    assert text.startswith("fledge: ")
    assert text.count("\n") == 1, text
    assert status in (2, 78)
    return text


def pasted(text):
    """The command that a message tells, which the parser understands."""
    words = shlex.split(re.search(r"`fledge (.+?)`", text)[1])
    if words[0] not in ("--help", "--version"):
        verbs = cli_hints.known_verbs(fledge._parser())
        options, rest = fledge._parser().parse_known_args(words)
        assert words[0] in verbs
        assert rest == [], text
        assert all("=" in word for word in getattr(options, "overrides", ()))
    return shlex.join(words)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("trian quick --data photos", "train quick --data photos"),
        ("--verison", "--version"),
        ("-v", "--version"),
        ("version", "--version"),
        ("hlep", "--help"),
        ("evalute runs/quick", "evaluate runs/quick"),
        ("exprot runs/quick --out bundle", "export runs/quick --out bundle"),
        ("fit quick --data 'my photos'", "train quick --data 'my photos'"),
        ("predict photos --bundle bundle --out s.csv", "score photos --bundle bundle --out s.csv"),
        ("lr_find quick --data photos", "lr-find quick --data photos"),
        ("resume runs/cut", "train --resume runs/cut"),
        ("clean", "cache --clear"),
        ("models", "layers"),
    ],
)
def test_an_unknown_command_gets_the_nearest_one(words, meant, capsys):
    assert pasted(said(capsys, *shlex.split(words))) == meant


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["--frobnicate"], ["--debug", "train"]])
def test_without_a_command_all_are_listed(words, capsys):
    assert "train, lr-find, ablate" in said(capsys, *words)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("serve bundle --prot 3000", "`--port 3000`"),
        ("serve bundle --bind 0.0.0.0", "`--host 0.0.0.0`"),
        ("serve bundle 3000", "`--port 3000`"),
        ("score photos --model bundle --output s.csv", "`--bundle bundle`"),
        ("score photos --bundle bundle --output=s.csv", "`--out s.csv`"),
        ("export runs/quick bundle", "`--out bundle`"),
        ("evaluate runs/quick 'my photos'", "`--data 'my photos'`"),
        ("train quick --data photos --epochs 10", "'stage.head.epochs=10'"),
        ("train --epochs=10 quick --data photos", "'stage.head.epochs=10'"),
        ("train --epochs 10 quick --data photos", "'stage.head.epochs=10'"),
        ("train --data photos --epochs 10 dogs-vs-cats", "'stage.head.cycle_len'"),
        ("train quick --data photos --batch-size 16", "'batch_size=16'"),
        ("train quick --data photos --label-smoothing 0.2", "'label_smoothing=0.2'"),
        ("train quick --data photos --lr 0.1", "'stage.head.lr=0.1'"),
        ("train quick --data photos --output runs/x", "--out runs/x"),
        ("train quick --data photos --model resnet18", "'arch=resnet18'"),
        ("train quick --dta photos", "`--data photos`"),
        ("lr-find quick --data photos --batch 16", "'batch_size=16'"),
    ],
)
def test_an_unknown_option_gets_the_nearest_one(words, meant, here, capsys):
    text = said(capsys, *shlex.split(words))
    assert "is no option of fledge" in text
    assert meant in text


def test_options_that_argparse_refuses_are_one_line(capsys):
    text = said(capsys, "serve", "bundle", "--device", "gpu")
    assert text.startswith("fledge: --device: invalid choice: 'gpu'")
    assert "`fledge serve --help` describes it" in text
    assert said(capsys, "inspect").startswith("fledge: the following arguments are required")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("train quick photos", "train quick --data photos"),
        ("train quick 'my photos'", "train quick --data 'my photos'"),
        ("train photos quick", "train quick --data photos"),
        ("train photos", "train quick --data photos"),
        ("train photos.zip", "train quick --data photos.zip"),
        ("train 'my photos'", "train quick --data 'my photos'"),
        ("train --data 'my photos'", "train quick --data 'my photos'"),
        ("ablate tricks photos", "ablate tricks --data photos"),
        ("train birds.toml", "train birds.toml --data photos"),
        ("train runs/quick --data photos", "train runs/quick/recipe.toml --data photos"),
        ("train runs/cut --data photos", "train --resume runs/cut"),
        ("train bundle --data photos", "inspect bundle"),
        ("train quick --data bundle", "inspect bundle"),
        ("train quick --data runs/cut", "train --resume runs/cut"),
        ("train --resume bundle", "inspect bundle"),
        ("train --resume runs/quick/best.safetensors", "train --resume runs/quick"),
        ("preview quick", "preview photos --recipe quick"),
        ("preview quick photos", "preview photos --recipe quick"),
        ("preview bundle", "inspect bundle"),
        ("evaluate bundle", "inspect bundle"),
        ("evaluate photos", "train quick --data photos"),
        ("report bundle/v1", "inspect bundle"),
        ("evaluate runs/cut", "train --resume runs/cut"),
        ("export runs/cut", "train --resume runs/cut"),
        ("export birds.toml", "train birds.toml --data photos"),
        ("inspect runs/quick", "export runs/quick --out bundle"),
        ("serve runs/quick", "export runs/quick --out bundle"),
        ("verify runs", "export runs/quick --out bundle"),
        ("serve 'my photos'", "train quick --data 'my photos'"),
        ("score photos bundle", "score photos --bundle bundle --out scores.csv"),
        ("score 'my photos' --bundle bundle", "score 'my photos' --bundle bundle --out scores.csv"),
        ("score photos --bundle runs/quick --out s.csv", "export runs/quick --out bundle"),
        ("score runs/quick --bundle bundle --out s.csv", "evaluate runs/quick"),
        ("evaluate-scores photos --labels-from-folders",
         "score photos --bundle bundle --out scores.csv"),
        ("evaluate-scores bundle --labels-from-folders",
         "score photos --bundle bundle --out scores.csv"),
    ],
)  # fmt: skip
def test_a_path_that_is_something_else_gets_the_command_for_it(words, meant, here, capsys):
    assert pasted(said(capsys, *shlex.split(words))) == meant


def test_photos_beside_files_with_the_names_of_marks_are_photos(here):
    for name in ("run.json", "manifest.json", "manifest.sha256", "best.json"):
        (here / "photos" / name).write_text("{}")
    assert path_kind.kind_of(here / "photos") == "photos"
    assert path_kind.not_wanted(here / "photos", "photos") == ""


def test_what_is_damaged_is_left_to_the_command(here, capsys):
    (here / "bundle/manifest.json").write_text('{"cut off')
    assert "bundle/manifest.json" in said(capsys, "inspect", "bundle")
    (here / "runs/quick/run.json").unlink()
    (here / "runs/quick/best.json").write_text('{"cut off')
    assert "best.json is not a checkpoint description" in said(capsys, "evaluate", "runs/quick")
    (here / "empty").mkdir()
    assert "empty: manifest.json is missing" in said(capsys, "serve", "empty")
    assert "empty/best.json is missing" in said(capsys, "evaluate", "empty")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("evaluate quick", "runs/quick"),
        ("serve bundel", "bundle"),
        ("export runs/quik", "runs/quick"),
        ("evaluate runs", "runs/quick"),
        ("serve bundle/v1", "bundle"),
        ("train bird.toml --data photos", "use one of demo"),
        ("train birds --data photos", "birds.toml"),
        ("train qiuck --data photos", "'quick'"),
        ("train quick --data phtos", "photos"),
        ("serve x.onnx", "name the bundle's folder"),
        ("evaluate x.onnx", "name the run that it was exported from"),
    ],
)
def test_a_path_that_does_not_exist_gets_the_nearest_one(words, meant, here, capsys):
    assert meant in said(capsys, *shlex.split(words))


@pytest.mark.parametrize(
    "command",
    [
        "preview PATH",
        "preview --data PATH data.valid=0.3",
        "train quick --data PATH",
        "train --data PATH quick",
        "train quick --data=PATH",
        "score PATH --bundle bundle --out x.csv",
    ],
)
def test_a_path_with_spaces_that_lost_its_quotes_is_told_in_quotes(here, capsys, command):
    path = str(here / "my photos")
    text = said(capsys, *command.replace("PATH", path).split(" "))
    assert f"; did you mean '{path}', in quotes?" in text


def test_words_that_are_no_path_together_are_no_path_with_spaces(here, capsys):
    assert "quotes" not in said(capsys, "preview", str(here / "my"), "pictures")
    assert "quotes" not in said(capsys, "preview", str(here / "my"), "--out", "photos")


def test_preview_takes_the_data_after_its_option_as_errors_tell_it(here, capsys):
    for words in (["--data", "/no-where"], ["data.valid=0.3", "--data", "/no-where"]):
        assert "/no-where" in said(capsys, "preview", *words)
        assert "no such folder or archive" in said(capsys, "preview", *words)
    both = said(capsys, "preview", "photos", "--data", "my photos")
    assert "photos and --data 'my photos' both name the data; keep one of them" in both
    assert "name the data: fledge preview DATA" in said(capsys, "preview", "data.valid=0.3")
    assert "is no option of fledge preview" in said(capsys, "preview", "-x")


def test_a_table_of_options_is_told_apart_from_the_command(here, capsys):
    text = said(capsys, "preview", "photos", "--optimizer", "adam")
    assert "is no option of fledge preview; it is a table of options; did you mean" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train quick --data labels.txt", "labels.txt"),
        ("train quick --data labels.ndjson", "labels.ndjson"),
        ("train quick --data labels.xlsx", "spreadsheet or zip archive; save the sheet as"),
        ("train quick --data set.txz", "set.txz"),
        ("preview set.tbz2", "set.tbz2"),
    ],
)
def test_a_file_of_photos_reaches_the_command(words, told, here, capsys):
    for name in ("labels.txt", "labels.ndjson", "set.txz", "set.tbz2"):
        (here / name).write_text("broken")
    (here / "labels.xlsx").write_bytes(b"PK\3\4" + bytes(30) + b"[Content_Types].xml")
    assert fledge.main(shlex.split(words)) == 2
    text = capsys.readouterr().err
    assert told in text
    assert "not photos" not in text


@pytest.mark.parametrize("name", ["sample", "flowers102", "photo*", "photos.zip::1.jpg"])
def test_a_name_that_is_no_path_is_left_to_the_command(name, here):
    for folder in ("samples/a", "flowers/a"):
        (here / folder).mkdir(parents=True)
        (here / folder / "1.jpg").touch()
    assert path_kind.not_wanted(path_kind.Path(name), "photos", "--data") == ""


def test_a_word_beside_a_full_command_is_no_misspelled_option(here, capsys):
    text = said(capsys, "train", "quick", "--data", "photos", "foo")
    assert text.endswith("fledge train; an option of the recipe is written as key=value\n")
    for word, meant in (("lr", "stage.head.lr"), ("bs", "batch_size"), ("epochs", "epochs")):
        assert meant in said(capsys, "train", "quick", "--data", "photos", word)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("serve --bundle 'my bundle'", "serve 'my bundle'"),
        ("serve --bundle=bundle --port 3000", "serve bundle --port 3000"),
        ("serve --port 3000 --bundle bundle", "serve bundle --port 3000"),
        ("inspect --bundle bundle --json", "inspect bundle --json"),
        ("verify --bundle=bundle", "verify bundle"),
    ],
)
def test_a_bundle_that_is_given_as_an_option_is_an_argument(words, meant, capsys):
    assert pasted(said(capsys, *shlex.split(words))) == meant


def test_files_of_weights_are_found_as_training_finds_them(here, monkeypatch):
    from training.config import load
    from training.engine import plan

    monkeypatch.setenv("HOME", str(here))
    (here / "w.pth").touch()
    (here / "odd::name.pth").touch()
    for weights in ("w.pth", "w.pth::model_ema", "~/w.pth", "~/w.pth::a", "odd::name.pth"):
        recipe = load.read(path_kind.Path("quick"), [f"weights={weights}"])
        assert list(plan.mistakes(recipe)) == [], weights
    recipe = load.read(path_kind.Path("quick"), ["weights=x.pth::a"])
    assert "no such file" in next(plan.mistakes(recipe))[1]
