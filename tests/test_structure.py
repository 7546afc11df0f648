"""Laws of the house: who may import whom, what the commands are, how big a room is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("serving", "training", "export")
TARGETS = (
    *("help", "install", "demo", "train", "export", "serve", "score"),
    *("test", "test-slow", "test-docker", "check", "bento", "image", "run-image"),
    *("sbom", "audit"),
)
MAKEFILE = (ROOT / "Makefile").read_text()
DEFINED = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
LOCKS = sorted(
    path
    for path in (ROOT / "requirements").glob("*.txt")
    if not path.name.endswith("overrides.txt")
)


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    # What the make that started these tests was told is not for the make that they start.
    told = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in told}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_imports_keep_their_contracts() -> None:
    done = tool(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_every_promised_target(target: str) -> None:
    assert target in DEFINED


def test_make_alone_lists_every_target() -> None:
    alone, asked = tool("make"), tool("make", "help")
    assert alone.stdout == asked.stdout
    listed = set(re.findall(r"make ([a-z-]+) +\S", asked.stdout))
    assert listed == DEFINED


def test_an_unfit_python_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    for name in ("pyproject.toml", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = tool("make", "--no-print-directory", "-C", str(tmp_path), "install", "PYTHON=false")
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if "***" not in line]
    assert len(ours) == 1
    assert ours[0].startswith("make: false is not Python 3.11 to 3.13")
    assert not (tmp_path / ".venv").exists()


def test_there_are_lock_files() -> None:
    assert {path.name for path in LOCKS} == {
        "dev.txt",
        "serving.txt",
        "serving-cpu.txt",
        "serving-gpu.txt",
        "uv.txt",
    }


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_requirements_are_locked_by_hash_and_name_no_index(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    for requirement in re.split(r"\n(?=[a-z0-9])", text.strip()):
        assert re.match(r"[A-Za-z0-9._-]+==\S+", requirement), requirement
        assert "--hash=sha256:" in requirement, requirement


@pytest.mark.parametrize("name", ["serving.txt", "serving-cpu.txt", "serving-gpu.txt"])
def test_what_serving_needs_holds_no_torch(name: str) -> None:
    names = re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements" / name).read_text(), re.M)
    assert not {"torch", "torchvision", "onnx", "pytest", "ray", "pandas"} & set(names)


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_outgrows_its_room(room: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / room).rglob("*.py")
    }
    assert lengths
    assert {path: lines for path, lines in lengths.items() if lines > 300} == {}


def test_the_wheel_holds_the_rooms_and_the_front_door(tmp_path: Path) -> None:
    done = tool(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"fledge.py"}
    for room in ROOMS:
        expected |= {
            str(path.relative_to(ROOT))
            for path in (ROOT / room).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    assert names == expected
    assert "training/recipes/quick.toml" in names
