"""Structure of the project: import contracts, make targets, lock files, sizes of the packages."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("serving", "training", "export")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400
MAX_MODULES = 14  # of a folder, without __init__.py
MAX_README = 10_240  # bytes
MAX_TOP_LEVEL = 20  # of the three packages together, without subfolders
TARGETS = (
    *("help", "install", "demo", "train", "export", "serve", "score"),
    *("test", "test-process", "test-slow", "test-docker", "coverage", "fuzz", "check"),
    *("bento", "image", "run-image", "sbom", "audit"),
)
MAKEFILE = (ROOT / "Makefile").read_text()
DEFINED = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
LOCKS = sorted(
    path
    for path in (ROOT / "requirements").glob("*.txt")
    if not path.name.endswith("overrides.txt")
)


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    # Settings of the make that started these tests must not reach the make that they start.
    variables = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in variables}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_the_import_contracts_are_kept() -> None:
    done = tool(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_every_promised_target(target: str) -> None:
    assert target in DEFINED


def test_make_without_a_target_lists_every_target() -> None:
    default, listing = tool("make"), tool("make", "help")
    assert default.stdout == listing.stdout
    listed = set(re.findall(r"make ([a-z-]+) +\S", listing.stdout))
    assert listed == DEFINED


def test_variables_of_make_in_lower_case_are_refused() -> None:
    done = tool("make", "train", "data=photos")
    assert done.returncode == 2
    assert "write DATA= in capitals, not data=" in done.stderr
    assert not done.stdout


def test_an_unsupported_python_version_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    for name in ("pyproject.toml", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = tool("make", "--no-print-directory", "-C", str(tmp_path), "install", "PYTHON=false")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "***" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("make: false is not Python 3.11 to 3.13")
    assert not (tmp_path / ".venv").exists()


def test_the_lock_files_exist() -> None:
    assert {path.name for path in LOCKS} == {
        "dev.txt",
        "fuzz.txt",
        "heif.txt",
        "jxl.txt",
        "serving.txt",
        "serving-cpu.txt",
        "serving-gpu.txt",
        "uv.txt",
    }


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_requirements_are_locked_by_hash_without_an_index_address(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    for requirement in re.split(r"\n(?=[a-z0-9])", text.strip()):
        assert re.match(r"[A-Za-z0-9._-]+==\S+", requirement), requirement
        assert "--hash=sha256:" in requirement, requirement


@pytest.mark.parametrize("name", ["serving.txt", "serving-cpu.txt", "serving-gpu.txt"])
def test_the_requirements_of_serving_have_no_training_packages(name: str) -> None:
    names = re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements" / name).read_text(), re.M)
    assert not {"torch", "torchvision", "onnx", "pytest", "ray", "pandas"} & set(names)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_module_has_more_than_400_lines() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in MODULES}
    assert lengths
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_folder_has_more_than_14_modules() -> None:
    modules = [path for path in MODULES if path.name != "__init__.py"]
    counts = Counter(relative(path.parent) for path in modules)
    assert counts
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_at_most_20_modules_lie_outside_of_subpackages() -> None:
    top_level = [relative(path) for path in MODULES if path.parent.parent == ROOT]
    assert top_level
    assert len(top_level) <= MAX_TOP_LEVEL, top_level


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{relative(path)}:{node.lineno}")
    assert places
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_the_wheel_contains_the_packages_and_fledge_py(tmp_path: Path) -> None:
    done = tool(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"fledge.py"}
    for package in PACKAGES:
        expected |= {
            str(path.relative_to(ROOT))
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    assert names == expected
    assert "training/recipes/quick.toml" in names


def test_the_readme_has_at_most_10_kb() -> None:
    assert (ROOT / "README.md").stat().st_size <= MAX_README
