"""A start that was killed does not block its folder; what a user wrote is never replaced."""

import os
import subprocess
from pathlib import Path

import pytest

from serving.errors import OptionError
from training.run.folder import check_out, update_latest_link


def run_folder(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["stages/"],
        ["stages/", "last/"],
        ["stages/", "last/", ".recipe.toml.0123456789abcdef.partial"],
        ["stages/", "last/", "recipe.toml", "split.csv", ".run.json.0123456789abcdef.partial"],
    ],
)
def test_a_folder_in_which_a_run_almost_started_can_be_used(tmp_path: Path, names: list) -> None:
    check_out(run_folder(tmp_path / "run", *names))


@pytest.mark.parametrize(
    "names",
    [
        ["recipe.toml"],
        ["stages/", "recipe.toml"],
        ["notes.txt", "stages/", "last/"],
        ["stages/head.safetensors", "last/"],
        ["stages/", "last/state.safetensors", "recipe.toml"],
        ["stages/", "last", "recipe.toml"],
        ["stages/", "last/", "recipe.toml", "split.csv", "run.json"],
    ],
)
def test_a_folder_with_anything_else_is_refused(tmp_path: Path, names: list) -> None:
    folder = run_folder(tmp_path / "run", *names)
    with pytest.raises(OptionError, match="exists already"):
        check_out(folder)


def test_the_link_to_the_latest_run_replaces_those_of_killed_processes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        (runs / name).mkdir(parents=True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale, other = runs / f".latest.partial-{ended.pid}", runs / f".latest.partial-{os.getppid()}"
    stale.symlink_to("a")
    other.symlink_to("a")
    for name in ("a", "b"):
        update_latest_link(runs / name)
        assert os.readlink(runs / "latest") == name
    assert {path.name for path in runs.iterdir()} == {"a", "b", "latest", other.name}
