"""Escape sequences and line breaks in names reach no terminal."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import inspect, storage
from serving.errors import BundleError, DataError, OptionError
from serving.terminal import escape, escape_json, show
from tests.support.tiny_bundle import altered, photo, tiny_bundle
from training.utils.console import format_mistakes

ROOT = Path(__file__).parents[2]
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\r\nfledge: ok\u202egnp.\u2066\u2028\x7f"
CONTROL = {chr(code) for code in (*range(32), *range(0x7F, 0xA0))} | set("\u202e\u2066\u2028")


def is_plain(text: str) -> bool:
    return not (set(text) - {"\n"}) & CONTROL


def fledge(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "fledge", *map(os.fspath, arguments)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        timeout=60,
        check=False,
    )


def plain(output: bytes) -> str:
    text = output.decode()
    assert is_plain(text), repr(text)
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tiny_bundle(tmp_path / "bundle")
    labels = tuple(f"{HOSTILE}{number}" for number in range(3))
    reports: dict[str, Any] = {
        "tried": {f"int8{HOSTILE}": {"kept": False, "why_not": HOSTILE}},
        "provenance": {"run": HOSTILE, "data": {"source": HOSTILE, "train": HOSTILE}},
    }
    altered(folder, name=HOSTILE, arch=HOSTILE, labels=labels, **reports)
    return folder


@pytest.mark.parametrize("text", [HOSTILE, *sorted(CONTROL), "\ud800", "a\udcff"])
def test_escaped_text_is_one_plain_line_that_can_be_encoded(text: str) -> None:
    assert is_plain(escape(text))
    assert "\n" not in escape(text)
    escape(text).encode()


@pytest.mark.parametrize(
    "text", ["", "plain", "Ærøskøbing", "日本語", "👩‍🌾", "עברית", "a b", "\\x1b"]
)
def test_other_text_is_unchanged(text: str) -> None:
    assert escape(text) == escape_json(text) == text


def test_escaped_json_has_the_same_value() -> None:
    values = {HOSTILE: [HOSTILE, "\n"]}
    text = escape_json(json.dumps(values, indent=2, ensure_ascii=False))
    assert is_plain(text)
    assert json.loads(text) == values


def test_an_error_is_one_line_and_the_lines_of_mistakes_stay(tmp_path: Path) -> None:
    assert str(DataError(f"{HOSTILE}: wrong")).count("\n") == 0
    assert is_plain(str(OptionError("a", details=HOSTILE)))
    several = OptionError(*format_mistakes(HOSTILE, ["one\n", "two"]))
    assert str(several).splitlines()[1:] == ["  one\\n", "  two"]
    with pytest.raises(BundleError) as refused:
        storage.read(tmp_path / HOSTILE)
    assert is_plain(str(refused.value))
    assert "\n" not in str(refused.value)


def test_a_bundle_with_hostile_names_is_described_in_plain_lines(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in inspect.describe(folder):
        show(line)
    lines = capsys.readouterr().out.splitlines()
    assert is_plain("".join(lines))
    assert len(lines) == len(inspect.describe(folder))


@pytest.mark.process
def test_commands_print_hostile_names_escaped(folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / f"{HOSTILE.replace('/', '')}.jpg").write_bytes(photo(1))
    (photos / "list.txt").write_text(f"photos/{HOSTILE}.jpg\n")
    table = tmp_path / "scores.csv"
    for command, locale in ((["inspect", folder], "C.UTF-8"), (["inspect", folder], "POSIX")):
        done = fledge(*command, LC_ALL=locale, PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        assert done.returncode == 0, done.stderr
        assert "\\x1b]0;title" in plain(done.stdout)
    done = fledge("inspect", folder, "--json")
    assert json.loads(plain(done.stdout))["name"] == HOSTILE
    done = fledge("score", photos, "--bundle", folder, "--out", table)
    assert done.returncode == 0, done.stderr
    assert "\\x1b]0;title" in plain(done.stdout)
    plain(done.stderr)
    done = fledge("evaluate-scores", table, "--labels-from-folders")
    plain(done.stdout)
    plain(done.stderr)
    for command in (
        ["inspect", tmp_path / HOSTILE.replace("/", "")],
        ["verify", tmp_path / HOSTILE.replace("/", "")],
        ["score", str(tmp_path / HOSTILE), "--bundle", folder, "--out", table],
        ["train", f"{HOSTILE}.toml", "--data", photos],
        ["layers", HOSTILE],
        ["evaluate", HOSTILE],
        ["preview", "--data", HOSTILE],
    ):
        done = fledge(*command)
        assert done.returncode in (2, 78), (command, done)
        assert plain(done.stderr).count("\n") == 1, done.stderr


def test_nothing_is_printed_but_through_the_module_that_escapes() -> None:
    allowed = {
        "serving/terminal.py",
        "fledge.py",  # prints errors, which escape themselves
        "serving/bundle/manifest.py",  # prints the published schema
    }
    found = set()
    for path in [ROOT / "fledge.py", *(p for d in ("serving", "training", "export")
                                       for p in (ROOT / d).rglob("*.py"))]:  # fmt: skip
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and node.id == "print":
                found.add(str(path.relative_to(ROOT)))
    assert found == allowed
