import os
import subprocess
import sys

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


def test_the_module_brings_no_room_with_it():
    # `bentoml serve fledge:latest` imports it first, and then the Bento's own `serving`.
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
def test_every_verb_teaches_with_an_example(verb, capsys):
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
        (["train", "--resume", "/nowhere", "batch_size=3"], 2, "goes on as the run began"),
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
def test_mistakes_are_one_line_on_stderr(words, status, message, capsys):
    assert fledge.main(words) == status
    said = capsys.readouterr().err
    assert said.startswith("fledge: ")
    assert said.count("\n") == 1
    assert message in said


def test_debug_shows_the_traceback(capsys):
    assert fledge.main(["inspect", "/nowhere", "--debug"]) == 78
    assert "Traceback" in capsys.readouterr().err


def test_layers_teaches_overrides(capsys):
    with pytest.raises(SystemExit):
        fledge.main(["layers", "--help"])
    assert "fledge layers [ARCH] [--recipe FILE [key=value …]]" in capsys.readouterr().out


def test_every_mistake_of_a_recipe_is_a_line(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "x"\narch = "resnet19"\nsize = 9\n[[stage]]\nname = "head"\n')
    assert fledge.main(["train", str(recipe), "--data", "x"]) == 2
    assert capsys.readouterr().err == (
        f"fledge: {recipe} has 2 mistakes:\n"
        "  line 2: arch = 'resnet19' is unknown: did you mean 'resnet18'?\n"
        "  line 3: size is unknown; did you mean 'preprocess.size'?\n"
    )


ENDS = """
import atexit, sys, torch, fledge
atexit.register(print, "told at the end")
fledge.main = lambda: {status}
print("not flushed yet", end="; ")
fledge.program()
"""


@pytest.mark.parametrize("status", [0, 78])
def test_a_process_with_torch_ends_at_once_and_loses_nothing(status):
    words = [sys.executable, "-c", ENDS.format(status=status)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stdout == "not flushed yet; told at the end\n"


def test_it_does_not_end_at_once_where_nobody_reads():
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    words = [sys.executable, "-c", ENDS.format(status=0)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        words, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, env=buffered
    )
    reader.stdin.close()
    assert done.returncode == 120  # Python's own for output that could not be written
    assert "BrokenPipeError" in done.stderr
