"""`fledge verify` and `fledge serve` refuse a changed bundle and name the file."""

import hashlib
import json
import shutil

import pytest

import fledge
from serving.bundle import storage


@pytest.fixture
def folder(exported_in_all_formats, tmp_path):
    """A copy of an exported bundle."""
    return shutil.copytree(exported_in_all_formats.out, tmp_path / "bundle")


@pytest.fixture
def refused(capsys):
    """Check that both subcommands refuse a folder with exit code 78; returns their one line."""

    def run(folder):
        lines = set()
        for verb in ("verify", "serve"):
            assert fledge.main([verb, str(folder)]) == 78
            lines.add(capsys.readouterr().err.strip())
        (line,) = lines  # the same text from both
        assert "\n" not in line
        return line

    return run


def test_a_changed_byte_in_any_file_is_refused_naming_the_file(folder, refused):
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {".onnx", ".ts", ".pt2", ".jpg", ".md", ".json", ".sha256"}
    assert {path.suffix for path in files} == kinds
    for path in files:
        data = path.read_bytes()
        at = min(len(data) // 2, 63)  # in the checksum file: its last digit
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert path.name in refused(folder)
        path.write_bytes(data)
    assert fledge.main(["verify", str(folder)]) == 0


def swap_labels(values):
    values["labels"][0], values["labels"][1] = values["labels"][1], values["labels"][0]


def remove_view(values):
    del values["views"][-1]


def halve_temperature(values):
    values["temperature"] /= 2


@pytest.mark.parametrize("new_checksum", [False, True], ids=["old checksum", "new checksum"])
@pytest.mark.parametrize("change", [swap_labels, remove_view, halve_temperature])
def test_a_changed_manifest_is_refused_with_its_old_and_with_a_new_checksum(
    folder, refused, change, new_checksum
):
    path = folder / storage.MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    if new_checksum:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / storage.CHECKSUM).write_text(f"{digest}  {storage.MANIFEST}\n")
    line = refused(folder)
    assert str(path) in line
    assert "was changed after export" in line
