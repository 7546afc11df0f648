"""Every command in every surrounding: the work is done, or one line says what is missing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support import surroundings
from tests.support.live_server import free_port
from tests.support.surroundings import ASCII, FLEDGE, LIKE_ANYONE, NO_NAME, Surrounding
from tests.support.tiny_bundle import altered, photo, tiny_bundle

pytestmark = pytest.mark.process

RECIPE = """
name = "odd"
arch = "mobilenet_v2"
weights = "none"
batch_size = 8
precision = "fp32"
arch_args = { width_mult = 0.25, inverted_residual_setting = [[1, 16, 1, 2], [2, 16, 1, 1]] }
preprocess = { size = 32, crop = 1.0 }
head = { hidden = 16, dropout = 0.1 }
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.05
cycle_len = 1
"""
LABELS = ("été", "it's", "日本")
ODD = os.fsdecode(b'it\'s "my" $data\xff `here`')


@dataclass
class Place:
    """Inputs that all tests of a module share.

    Attributes:
        folder: Parent of all; any user can write to it.
        photos, recipe, run, bundle, table: The inputs; they can't be written to.
    """

    folder: Path
    photos: Path
    recipe: Path
    run: Path
    bundle: Path
    table: Path


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    folder = surroundings.workspace()
    photos = folder / ODD / "photos"
    for number, label in enumerate(LABELS):
        (photos / label).mkdir(parents=True)
        for index in range(8):
            name = os.fsdecode(b"\xe9-%d.jpg" % index) if index % 2 else f"-é {index}'.jpg"
            (photos / label / name).write_bytes(photo(10 * number + index))
    recipe = folder / ODD / "a recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    run, bundle = folder / ODD / "my run", tiny_bundle(folder / ODD / "my bundle")
    altered(bundle, labels=LABELS)
    table = folder / ODD / "tablé.csv"
    made = Place(folder, photos, recipe, run, bundle, table)
    usual = Surrounding()
    for words in (commands(made, folder / "first")[name] for name in ("train", "score")):
        done = usual.run(*FLEDGE, *words, cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "first" / "run").rename(run)
    (folder / "first" / "scores.csv").rename(table)
    yield made
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def commands(place: Place, out: Path) -> dict[str, list[str | Path]]:
    """A command line of every verb but `serve`, which writes below `out`."""
    out.mkdir(exist_ok=True)
    out.chmod(0o777)
    data = ["--data", place.photos, "--device", "cpu"]
    scoring = ["--bundle", place.bundle, "--out", out / "scores.csv"]
    run = place.run if place.run.exists() else out / "run"
    return {
        "train": ["train", place.recipe, *data, "--out", out / "run"],
        "lr-find": ["lr-find", place.recipe, *data, "--out", out / "lr.png"],
        "preview": ["preview", place.photos, "--out", out / "preview"],
        "augment": ["preview", place.photos, "--augment", "--out", out / "preview"],
        "layers": ["layers", "resnet18"],
        "sample": ["sample", out / "sample", "--per-class", "2"],
        "evaluate": ["evaluate", run, "--csv", out / "photos.csv", "--device", "cpu"],
        "cache": ["cache"],
        "export": ["export", run, "--out", out / "bundle", "--precision", "fp32"],
        "inspect": ["inspect", place.bundle],
        "verify": ["verify", place.bundle],
        "score": ["score", place.photos, *scoring],
        "evaluate-scores": ["evaluate-scores", place.table, "--labels-from-folders",
                            "--mistakes", out / "wrong.csv"],
    }  # fmt: skip


LIGHT = ("cache", "inspect", "verify", "score", "evaluate-scores")
HEAVY = ("train", "preview")
SLOW = ("lr-find", "augment", "layers", "sample", "evaluate", "export")

READ_ONLY = 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; cd "$1"; shift; exec "$@"'
SMALL_SHM = 'mount -t tmpfs -o size=64m tmpfs /dev/shm; exec "$@"'


def small_shm(place: Place) -> Surrounding:
    """As in a container of Docker without --shm-size."""
    words = ("unshare", "--mount", "sh", "-c", SMALL_SHM, "sh")
    return Surrounding(words=words, root=True)


def read_only(place: Place) -> Surrounding:
    """The inputs and the current folder are on a disk that can't be written to."""
    words = ("unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(place.folder / ODD))
    return Surrounding(words=words, root=True)


def no_home(place: Place) -> Surrounding:
    """A home that can't be written to, as of the user nobody; standard output is closed."""
    locked = place.folder / "locked"
    locked.mkdir(exist_ok=True)
    locked.chmod(0o555)
    env = {"HOME": str(locked), "TMPDIR": str(place.folder), "XDG_CACHE_HOME": str(locked / "x")}
    return Surrounding(env, streams=">&-", words=LIKE_ANYONE)


SURROUNDINGS = {
    "no-name-no-home-no-stdin": lambda place: Surrounding(
        {"TMPDIR": str(place.folder)}, home=False, streams="<&-", words=NO_NAME, root=True
    ),
    "latin-1-no-stderr": lambda _: Surrounding(surroundings.latin_1(), streams="2>&-"),
    "ascii-nobody-reads": lambda _: Surrounding(
        {**ASCII, "PYTHONIOENCODING": "ascii"}, pipe="2>&1 | true"
    ),
    "locked-home-no-stdout": no_home,
    "read-only": read_only,
    "small-shm": small_shm,
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize(
    "verb", [*LIGHT, *HEAVY, *(pytest.param(verb, marks=pytest.mark.slow) for verb in SLOW)]
)
def test_every_command_does_its_work_in_every_surrounding(
    place: Place, verb: str, surrounding: str
) -> None:
    out = place.folder / f"{verb} {surrounding}"
    words = commands(place, out)[verb]
    try:
        done = SURROUNDINGS[surrounding](place).run(*FLEDGE, *words, cwd=place.folder)
        assert done.returncode == 0, (done.stdout, done.stderr)
        for stream in (done.stdout, done.stderr):
            stream.decode()
            assert b"Traceback" not in stream, stream
            assert b"Exception ignored" not in stream
            assert b"Warning" not in stream
        check(place, verb, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def check(place: Place, verb: str, out: Path) -> None:
    """Check the files that a command has written."""
    if verb == "score":
        with (out / "scores.csv").open(
            encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            paths = [row["path"] for row in csv.DictReader(file)]
        assert len(paths) == 24
        assert all(map(os.path.exists, paths))
    elif verb == "train":
        classes = json.loads((out / "run" / "best.json").read_bytes())["classes"]
        assert set(classes) == set(LABELS)
        assert (out / "run" / "report.html").exists()
    elif verb in ("preview", "augment"):
        with Image.open(next((out / "preview").glob("*.png"))) as image:
            image.load()
    elif verb == "export":
        assert (out / "bundle" / "manifest.json").exists()
    elif verb == "sample":
        assert len(list((out / "sample").glob("*/*.jpg"))) >= 2
    elif verb == "evaluate":
        assert (out / "photos.csv").read_bytes().count(b"\n") > 1


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_a_service_starts_answers_and_stops_in_every_surrounding(
    place: Place, surrounding: str
) -> None:
    port = free_port()
    around = SURROUNDINGS[surrounding](place)
    words = [*FLEDGE, "serve", place.bundle, "--port", str(port)]
    # The shell would take the signal in place of a command before a pipe.
    around = Surrounding(**{**vars(around), "pipe": "", "streams": around.streams})
    with (place.folder / "log").open("wb") as log:
        process = subprocess.Popen(
            around.command(words), cwd=place.folder, env=around.environment(place.folder),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(trust_env=False, timeout=60) as client:
            ready = time.monotonic() + 60
            while True:
                try:
                    if client.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None, (place.folder / "log").read_text()
                assert time.monotonic() < ready, (place.folder / "log").read_text()
                time.sleep(0.05)
            answer = client.post(f"{url}/predict", content=photo(1))
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in (place.folder / "log").read_text()
    finally:
        process.kill()
        process.wait()
