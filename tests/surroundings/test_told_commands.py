"""Commands that are told work when they are pasted into a shell, whatever the names in them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from serving.terminal import escape, quote_path
from tests.support.surroundings import FLEDGE, Surrounding
from tests.support.tiny_bundle import photo, tiny_bundle
from tests.surroundings.test_commands import RECIPE

ROOT = Path(__file__).parents[2]
ODD = b'-it\'s  "my" $run\n`\xff\x1b\xc3\xa9'
NAMES = ["run", "my run", "it's", '"', "$HOME", "`ls`", "a\nb", "-x", "--out", "é", "日本", "\\",
         "\x1b]0;x\x07", "a\\'b\n", "!x", "*", "~", "#x", "\u202e", "\udcff", "\udce9t\udce9",
         "a;b|c&d", "{a,b}", "\t", "%s"]  # fmt: skip


def pasted(command: str, cwd: Path, **options: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command as it was shown, in a shell in which `fledge` can be found."""
    commands = cwd / "commands"
    commands.mkdir(exist_ok=True)
    fledge = commands / "fledge"
    fledge.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fledge "$@"\n')
    fledge.chmod(0o755)
    env = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", **options}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=env, capture_output=True, check=False, timeout=300
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_path_is_one_word_and_leads_to_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("found")
    word = quote_path(name)
    assert escape(word) == word
    word.encode()  # can be shown
    done = pasted(f"cat {word}", tmp_path)
    assert (done.returncode, done.stdout) == (0, b"found"), done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_quoted_path_can_be_pasted_from_a_terminal_of_another_encoding(
    tmp_path: Path, encoding: str
) -> None:
    code = (
        "from serving.utils import process; process.prepare()\n"
        "from serving.terminal import quote_path, show; show('cat ' + quote_path('日本é'))"
    )
    shown = Surrounding(env={"PYTHONIOENCODING": encoding}).run(
        sys.executable, "-c", code, cwd=tmp_path
    )
    (tmp_path / "日本é").write_text("found")
    done = pasted(shown.stdout.decode("ascii"), tmp_path)
    assert done.stdout == b"found", (shown, done)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(8):
            colour = (number * 30, 20, 200) if label == "a" else (20, number * 30, 20)
            Image.new("RGB", (40, 40), colour).save(tmp_path / "photos" / label / f"{number}.jpg")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def told(done: subprocess.CompletedProcess[bytes], before: str) -> str:
    """The rest of the line that has `before`."""
    found = re.search(f"{re.escape(before)}(.*)", done.stderr.decode())
    assert found, done.stderr
    return found[1]


@pytest.mark.process
def test_the_next_command_of_a_training_exports_its_run(place: Path) -> None:
    words = ["train", "recipe.toml", "--data", "photos", "--device", "cpu"]
    run = f"./{os.fsdecode(ODD)}"
    done = Surrounding().run(*FLEDGE, *words, f"--out={run}", cwd=place)
    assert done.returncode == 0, done.stderr
    command = told(done, "next: ")
    assert command.startswith("fledge export ")
    done = pasted(f"{command} --precision fp32", place)
    assert done.returncode == 0, (command, done.stderr)
    assert (place / "bundle" / "manifest.json").exists()
    # A finished run says the same again.
    done = Surrounding().run(*FLEDGE, "train", f"--resume={run}", cwd=place)
    assert told(done, "next: ") == command


@pytest.mark.process
def test_the_command_that_resumes_a_run_resumes_it(place: Path) -> None:
    words = ["train", "recipe.toml", "--data", "photos", "--device", "cpu"]
    words += ["stage.all.cycle_len=200", f"--out=./{os.fsdecode(ODD)}"]
    process = subprocess.Popen(
        [*FLEDGE, *words], cwd=place, env=Surrounding().environment(place), stderr=subprocess.PIPE
    )
    assert process.stderr
    lines = b""
    for line in process.stderr:
        lines += line
        if b"all   3  lr" in line:
            process.send_signal(2)
            break
    lines += process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130
    stopped = subprocess.CompletedProcess(words, 130, b"", lines)
    resume = told(stopped, "resume with: ")
    # The run's folder is taken: the same command is told there.
    again = Surrounding().run(*FLEDGE, *words, cwd=place)
    assert again.returncode == 2
    assert told(again, "resume that run with `").partition("`, or ")[0] == resume
    done = pasted(resume, place)
    assert done.returncode == 0
    assert b"resuming after" in done.stderr, done.stderr


@pytest.mark.parametrize(("option", "suffix"), [("--csv-safe", ".csv"), ("--csv-bom", ".csv"),
                                                ("--embeddings", ".parquet")])  # fmt: skip
def test_another_name_of_a_table_is_told_with_its_folder(
    tmp_path: Path, option: str, suffix: str
) -> None:
    folder = tmp_path / os.fsdecode(ODD)
    folder.mkdir()
    words = ["score", "x.jpg", "--bundle", "b", f"--out={folder / 'table.jsonl'}", option]
    done = Surrounding().run(*FLEDGE, *words, cwd=tmp_path)
    assert done.returncode == 2
    done = pasted(f"printf %s {told(done, 'use --out ')}", tmp_path)
    assert done.stdout == os.fsencode(folder / f"table{suffix}")


def test_the_command_that_makes_a_cache_private_does_so(tmp_path: Path) -> None:
    from training.utils import disk_cache

    folder = tmp_path / os.fsdecode(ODD)
    (folder / "entry").mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(PermissionError) as refused:
        disk_cache.check_private(folder / "entry")
    command = str(refused.value.strerror).partition("`")[2].partition("`, or")[0]
    assert pasted(escape(command), tmp_path).returncode == 0
    disk_cache.check_private(folder / "entry")


def test_every_command_with_a_path_in_it_is_quoted() -> None:
    """In the source: after `fledge VERB`, `chmod` and the like stands a call of `quote_path`."""
    command = re.compile(
        r"(\bfledge [a-z-]+|\b(chmod|openssl|git|cd|mv|rm|cp|unzip|docker))( -{0,2}[\w=,+-]+)* $"
    )
    wrong, right = [], 0
    for package in ("serving", "training", "export"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.JoinedStr):
                    continue
                for before, value in pairwise(node.values):
                    if not isinstance(before, ast.Constant) or not command.search(before.value):
                        continue
                    if "quote" in ast.unparse(value):
                        right += 1
                    else:
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert right >= 5
    assert wrong == []


TARGETS = {
    "train": ("train", "DATA", "--data"),
    "export": ("export", "RUN", "export"),
    "serve": ("serve", "BUNDLE", "serve"),
    "score": ("score", "INPUT", "score"),
    "bento": ("bento", "BUNDLE", "verify"),
}


@pytest.mark.parametrize("name", ["some folder/my bundle", "it's", '"a" b', "$HOME", "`ls`", "é"])
@pytest.mark.parametrize("target", TARGETS)
def test_make_passes_a_path_on_as_it_is(tmp_path: Path, target: str, name: str) -> None:
    makefile(tmp_path)
    goal, variable, before = TARGETS[target]
    for words, env in (([f"{variable}={name}"], {}), ([], {variable: name})):
        (tmp_path / "words").unlink(missing_ok=True)
        make(tmp_path, goal, *words, **env)
        found = (tmp_path / "words").read_text().split("\0")
        assert found[found.index(before) + 1] == name


@pytest.mark.parametrize("name", ["some folder/my bundle", 'it\'s "my" $bundle', "`ls`"])
def test_make_run_image_mounts_the_bundle_whatever_its_name(tmp_path: Path, name: str) -> None:
    makefile(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert make(tmp_path, "run-image", f"BUNDLE={name}").returncode == 0
    words = (tmp_path / "words").read_text().split("\0")
    assert words[words.index("--volume") + 1] == f"{tmp_path / name}:/bundle:ro"
    done = make(tmp_path, "run-image", "BUNDLE=no such")
    assert done.returncode == 2
    assert "there is no bundle no such" in done.stderr.decode()
    make(tmp_path, "image", f"BUNDLE={name}")
    assert (tmp_path / "words").read_text().split("\0")[-2] == name


def makefile(folder: Path) -> None:
    """Prepare a folder in which `make` runs programs that only note their arguments."""
    (folder / "Makefile").symlink_to(ROOT / "Makefile")
    for name in ("pyproject.toml", "requirements", "serving", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("bentofile.yaml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("fledge", "docker"):
        note = bin_folder / name
        note.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >'{folder}/words'\n")
        note.chmod(0o755)
    (folder / ".venv" / ".installed").touch()


def make(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
    }
    docker = f"DOCKER={folder}/.venv/bin/docker"
    return subprocess.run(
        ["make", *words, docker], cwd=folder, env={**inherited, **env}, capture_output=True,
        check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["option", "variable"])
def test_scoring_tells_the_option_that_lets_a_large_photo_in(tmp_path: Path, way: str) -> None:
    tiny_bundle(tmp_path / "bundle")
    (tmp_path / "x.jpg").write_bytes(photo(1, (300, 200)))
    words = ["score", "x.jpg", "--bundle", "bundle", "--out", "s.csv"]
    given = ["--max-pixels", "50000"] if way == "option" else []
    env = {} if given else {"FLEDGE_MAX_PIXELS": "50000"}
    Surrounding(env).run(*FLEDGE, *words, *given, cwd=tmp_path)
    error = (tmp_path / "s.csv").read_text().splitlines()[1]
    assert error.endswith("300 x 200 pixels are more than the 50000 allowed (--max-pixels)")
    done = Surrounding(env).run(*FLEDGE, *words, "--max-pixels", "60000", cwd=tmp_path)
    assert done.returncode == 0
    assert ",ok," in (tmp_path / "s.csv").read_text()
