"""The package as it is installed from a wheel, in any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.process
def test_shipped_recipes_are_found_by_name_in_any_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "quick").mkdir()  # a folder of the name, such as that of the photos
    own = 'name = "own"\narch = "resnet18"\n[[stage]]\nname = "mine"\n'
    (tmp_path / "pets.toml").write_text(own)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMANDS, str(installed)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["quick", "quick", "quick", "pets", "own"]
    missing = "fledge: --data 'photos': no such folder"
    expected = [
        missing,
        missing,
        "pets: the recipe that Fledge ships; yours is named pets.toml",
        missing,
        "fledge: quik: no such recipe; did you mean 'quick'? Else use one of demo, dog-breeds, "
        "dogs-vs-cats, flowers, pets, quick, tricks, or a file of your own",
    ]
    for line, start in zip(done.stderr.splitlines(), expected, strict=True):
        assert line.startswith(start)


COMMANDS = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import fledge, training
from training.config import load
assert training.__file__.startswith(sys.argv[1])
for name in ("quick", "quick.toml", "./quick.toml", "pets", "pets.toml"):
    print(load.read(pathlib.Path(name)).name)
for name in ("quick", "./quick.toml", "pets", "quik"):
    assert fledge.main(["train", name, "--data", "photos"]) == 2
"""
