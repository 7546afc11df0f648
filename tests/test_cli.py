import argparse
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fledge


def test_help_is_quick_to_load_and_loads_no_torch():
    loaded = "import sys\ntry:\n fledge = __import__('fledge'); fledge.main(['--help'])\n"
    loaded += "except SystemExit: print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "COMMAND" in done.stdout
    modules = done.stdout.splitlines()[-1]
    for heavy in ("torch", "numpy", "bentoml", "onnxruntime", "PIL", "matplotlib"):
        assert f"'{heavy}'" not in modules


def test_importing_fledge_imports_no_package_of_the_project():
    # `bentoml serve fledge:latest` imports fledge.py before the Bento's own `serving`.
    look = "import sys, fledge; print({'serving', 'training', 'export'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    "verb",
    [
        *("train", "lr-find", "evaluate", "report", "ablate", "preview", "layers", "sample"),
        *("export", "inspect", "verify", "serve", "score", "evaluate-scores"),
    ],
)
def test_every_command_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        fledge.main([verb, "--help"])
    assert caught.value.code == 0
    assert f"example: fledge {verb}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["train", "nowhere.toml", "--data", "x"], 2, "nowhere.toml: no such recipe"),
        (["train", "training/recipes/quick.toml", "--data", "/nowhere"], 2, "no such folder"),
        (["train", "r.toml", "--data", "x", "--frobnicate"], 2, "'--frobnicate' is no option"),
        (["train"], 2, "name a recipe"),
        (["train", "training/recipes/quick.toml"], 2, "--data is missing"),
        (["train", "--data", "/nowhere", "training/recipes/quick.toml"], 2, "no such folder"),
        (["train", "--resume", "/nowhere"], 2, "run.json is missing"),
        (["train", "--resume", "/nowhere", "batch_size=3"], 2, "keeps the run's recipe"),
        (["lr-find", "training/recipes/quick.toml", "--data", "/nowhere"], 2, "no such folder"),
        (["report", "/nowhere"], 2, "best.json is missing"),
        (["layers", "resnet999"], 2, "resnet999"),
        (["preview", "/nowhere"], 2, "no such folder"),
        (["evaluate", "/nowhere"], 2, "best.json is missing; make one with `fledge train`"),
        (["export", "/nowhere", "--out", "b"], 2, "/nowhere"),
        (["inspect", "/nowhere"], 78, "no bundle in /nowhere"),
        (["verify", "/nowhere"], 78, "no bundle in /nowhere"),
        (["serve", "/nowhere"], 78, "no bundle in /nowhere"),
        (["score", "/nowhere", "--bundle", "b", "--out", "s.csv"], 2, "/nowhere"),
    ],
)
def test_wrong_arguments_give_an_exit_status_and_one_line_on_stderr(words, status, message, capsys):
    assert fledge.main(words) == status
    error = capsys.readouterr().err
    assert error.startswith("fledge: ")
    assert error.count("\n") == 1
    assert message in error


def test_debug_shows_the_traceback(capsys):
    assert fledge.main(["inspect", "/nowhere", "--debug"]) == 78
    assert "Traceback" in capsys.readouterr().err


def test_the_usage_of_layers_shows_overrides(capsys):
    with pytest.raises(SystemExit):
        fledge.main(["layers", "--help"])
    assert "fledge layers [ARCH] [--recipe FILE [key=value …]]" in capsys.readouterr().out


def test_every_error_in_a_recipe_has_one_line(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "x"\narch = "resnet19"\nsize = 9\n[[stage]]\nname = "head"\n')
    assert fledge.main(["train", str(recipe), "--data", "x"]) == 2
    assert capsys.readouterr().err == (
        f"fledge: {recipe} has 2 mistakes:\n"
        "  line 2: arch = 'resnet19' is unknown: did you mean 'resnet18'?\n"
        "  line 3: size is unknown; did you mean 'size = 9' under [preprocess]?\n"
    )


def test_overrides_are_accepted_anywhere_among_the_options():
    parts = ["r.toml", "a=1", "--data d", "--seed=3", "stage.head.lr=0.1"]
    parser = fledge._parser()
    for ordered in itertools.permutations(parts):
        options, rest = parser.parse_known_args(["train", *" ".join(ordered).split()])
        positionals = [part for part in ordered if not part.startswith("--")]
        assert [str(options.recipe), *options.overrides] == positionals
        assert (options.data, options.seed, rest) == ("d", 3, [])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["layers"], {"arch": None, "overrides": []}),
        (
            ["layers", "--recipe", "r", "resnet18", "a=1"],
            {"arch": "resnet18", "overrides": ["a=1"]},
        ),
        (["preview", "--seed", "3", "d", "a=1"], {"data": "d", "overrides": ["a=1"]}),
        (["train", "--resume", "run"], {"recipe": None, "overrides": []}),
    ],
)
def test_overrides_are_accepted_after_other_arguments(words, expected):
    options, rest = fledge._parser().parse_known_args(words)
    assert {name: getattr(options, name) for name in expected} == expected
    assert rest == []


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["train", "r.toml", "--data", "d", "batch_size"], "batch_size"),
        (["train", "r.toml", "--frobnicate", "a=1"], "--frobnicate"),
        (["inspect", "bundle", "a=1"], "a=1"),
    ],
)
def test_arguments_that_are_not_overrides_are_refused(words, wrong, capsys):
    assert fledge.main(words) == 2
    assert f"{wrong!r} is no option of fledge {words[0]}" in capsys.readouterr().err


def _raise_import_error(monkeypatch, error):
    def verb(options: argparse.Namespace) -> None:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(verb=verb, debug=False)
    monkeypatch.setattr(fledge, "_parser", lambda: parser)


@pytest.mark.parametrize("name", ["torch", "torchvision.models", "tomli_w"])
def test_a_missing_package_of_the_train_extra_is_named(name, monkeypatch, capsys):
    _raise_import_error(monkeypatch, ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert fledge.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fledge: {name} is not installed")
    assert "pip install '.[train]'" in error


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'training.missing'", name="training.missing"),
        ImportError("cannot import name 'missing' from 'torch'", name="torch"),
        ImportError("without a name"),
    ],
)
def test_any_other_import_error_is_raised(error, monkeypatch):
    _raise_import_error(monkeypatch, error)
    with pytest.raises(ImportError) as caught:
        fledge.main([])
    assert caught.value is error


def test_the_train_extra_is_complete():
    extra = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    names = extra["project"]["optional-dependencies"]["train"]
    modules = {re.match(r"[\w-]+", name)[0].replace("-", "_") for name in names}
    assert modules == set(fledge.TRAIN_EXTRA)


def test_without_training_and_export_the_commands_are_those_of_serving(monkeypatch):
    for area in ("training", "training.cli", "export", "export.cli"):
        monkeypatch.setitem(sys.modules, area, None)
    actions = fledge._parser()._actions
    (verbs,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    assert set(verbs) == {"inspect", "verify", "serve", "score", "evaluate-scores"}


ENDS = """
import atexit, os, sys, torch, fledge

def ended(status):  # a fork is faster than a new process, which must import torch again
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        atexit.register(print, "printed at exit")
        fledge.main = lambda: status
        print("not flushed yet", end="; ")
        fledge.program()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print(ended(0))
print(ended(78), flush=True)
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
print(ended(0), file=sys.stderr, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def ends():
    """Output of a process that runs `fledge.program` with torch, at last with a closed pipe."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", ENDS]
    return subprocess.run(words, capture_output=True, text=True, env=buffered)


def test_a_process_with_torch_exits_early_and_flushes_its_output(ends):
    text = "not flushed yet; printed at exit\n"
    assert ends.stdout == f"{text}0\n{text}78\n", ends.stderr


def test_output_that_nobody_reads_is_no_failure(ends):
    assert ends.stderr == "0\n"
