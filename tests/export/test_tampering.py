"""Whatever is changed in a real bundle, `fledge verify` and the service refuse it by name."""

import hashlib
import json
import shutil

import pytest

import fledge
from export import benchmark, pipeline
from serving.bundle import storage


@pytest.fixture(scope="module")
def exported(shared_run, tmp_path_factory):
    """A whole export, of which every test takes a copy."""
    out = tmp_path_factory.mktemp("tampering") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "measure", lambda graphs, *_: {})
        patch.setattr(benchmark, "advice", lambda *_: {})
        pipeline.export(
            shared_run.folder, out, pipeline.ExportOptions(precision="fp32"), log=lambda line: None
        )
    return out


@pytest.fixture
def refused(capsys):
    """Both doors refuse a folder with 78 and one line, which is returned."""

    def ask(folder):
        said = set()
        for verb in ("verify", "serve"):
            assert fledge.main([verb, str(folder)]) == 78
            said.add(capsys.readouterr().err.strip())
        (line,) = said  # the same words
        assert "\n" not in line
        return line

    return ask


def test_a_changed_byte_in_any_file(exported, tmp_path, refused):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {".onnx", ".ts", ".pt2", ".jpg", ".md", ".json", ".sha256"}
    assert {path.suffix for path in files} == kinds
    for path in files:
        whole = path.read_bytes()
        at = min(len(whole) // 2, 63)  # of the checksum: the last digit
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert path.name in refused(folder)
        path.write_bytes(whole)
    assert fledge.main(["verify", str(folder)]) == 0


def swap_labels(values):
    values["labels"][0], values["labels"][1] = values["labels"][1], values["labels"][0]


def remove_view(values):
    del values["views"][-1]


def sharpen(values):
    values["temperature"] /= 2


@pytest.mark.parametrize("mended", [False, True], ids=["as it is", "checksum mended"])
@pytest.mark.parametrize("change", [swap_labels, remove_view, sharpen])
def test_another_answer(exported, tmp_path, refused, change, mended):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    path = folder / storage.MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    if mended:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / storage.CHECKSUM).write_text(f"{digest}  {storage.MANIFEST}\n")
    line = refused(folder)
    assert str(path) in line
    assert "was changed after export" in line
