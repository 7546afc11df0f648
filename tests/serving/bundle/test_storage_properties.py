"""Laws of reading a bundle: no path in a manifest leads out of it, and every lie is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bundle import storage
from serving.errors import BundleError
from tests.support import file_events
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import texts
from tests.support.tiny_bundle import tiny_bundle

PARTS = st.sampled_from(["..", ".", "", "golden", "model.onnx", "0.jpg", "\\", "C:"]) | texts()
PATHS = st.builds(
    lambda start, parts: start + "/".join(parts),
    st.sampled_from(["", "/", "//", "../", "../../"]),
    st.lists(PARTS, min_size=1, max_size=4),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b")


def outside(folder: Path, allowed: Path) -> tuple[list[str], file_events.Listener]:
    """The files that are opened below `folder` but not below `allowed`, as they are opened."""
    found: list[str] = []

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path.startswith(f"{folder}{os.sep}") and not path.startswith(f"{allowed}{os.sep}"):
                found.append(path)

    return found, look


def write(folder: Path, manifest: dict[str, object]) -> None:
    data = json.dumps(manifest).encode()
    (folder / storage.MANIFEST).write_bytes(data)
    line = f"{hashlib.sha256(data).hexdigest()}  {storage.MANIFEST}\n"
    (folder / storage.CHECKSUM).write_text(line)


@given(PATHS, st.sampled_from(["files", "version", "golden", "graph", "all"]), st.booleans())
@examples(60)
def test_no_path_in_a_manifest_opens_a_file_outside_of_the_bundle(
    bundle, path, place, linked
) -> None:
    """Files that would match lie wherever the path may lead."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve()
        folder = top / "x" / "bundle"
        shutil.copytree(bundle, folder)
        manifest = json.loads((folder / storage.MANIFEST).read_text())
        secret = (folder / manifest["version"] / "model.onnx").read_bytes()
        for other in (top, top / "x", folder):
            (other / "model.onnx").write_bytes(secret)
        entry = manifest["files"]["model.onnx"]
        payload = folder / manifest["version"]
        if linked:
            (payload / "link").symlink_to(top)
            path = f"link/{path}"
        if place in ("files", "all"):
            manifest["files"][path] = entry
        if place in ("graph", "all"):
            manifest["precisions"]["fp32"]["file"] = path
        if place in ("golden", "all"):
            manifest["golden"][0]["file"] = path
        if place == "version":
            manifest["version"] = path
        write(folder, manifest)
        opened, listener = outside(top, folder)
        with file_events.listen(listener), suppress(BundleError):
            # It is read only if the path is another spelling of a file of the bundle.
            found = storage.read(folder)
            found.load(found.manifest.precisions["fp32"]["file"])
        assert opened == []


@given(st.data())
@examples(60)
def test_a_manifest_or_checksum_cut_or_changed_anywhere_is_refused(bundle, data) -> None:
    name = data.draw(st.sampled_from([storage.MANIFEST, storage.CHECKSUM]))
    original = (bundle / name).read_bytes()
    digest = len(original.split()[0]) if name == storage.CHECKSUM else len(original)
    at = data.draw(st.integers(0, digest - 1))
    changed = data.draw(
        st.sampled_from(
            [
                original[:at],
                original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :],
                original[:at] + b"\xff" + original[at:],
                original[:at] + original[at + 1 :],
            ]
        )
    )
    with tempfile.TemporaryDirectory() as top:
        folder = Path(shutil.copytree(bundle, Path(top, "b")))
        (folder / name).write_bytes(changed)
        with pytest.raises(BundleError):
            storage.read(folder)
