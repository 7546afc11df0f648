import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from serving.bundle import storage
from serving.bundle.manifest import Manifest, content_version
from serving.errors import BundleError
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import VIEWS
from tests.support.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "pristine")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and its checksum to match."""
    path = folder / storage.MANIFEST
    values = json.loads(path.read_text())
    change(values)
    data = json.dumps(values).encode()
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (folder / storage.CHECKSUM).write_text(f"{digest}  {storage.MANIFEST}\n")


def test_a_manifest_survives_a_round_trip_through_json(folder: Path) -> None:
    manifest = storage.read(folder).manifest
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json() == (folder / storage.MANIFEST).read_text()
    assert isinstance(again.preprocess, Preprocess)
    assert again.views == VIEWS


def test_the_checksum_file_is_in_the_format_of_sha256sum(folder: Path) -> None:
    digest, name = (folder / storage.CHECKSUM).read_text().split()
    assert name == storage.MANIFEST
    assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_changed_byte_in_any_file_is_refused_naming_the_file(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 7  # manifest, checksum, graph, card, three golden images
    for path in files:
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            if path.name == storage.CHECKSUM and at > 63:
                continue  # the name after the digest is not checked
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(BundleError, match=path.name):
                storage.read(folder)
        path.write_bytes(content)
    storage.read(folder)


def test_a_missing_file_is_refused_naming_it(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(BundleError, match=path.name):
            storage.read(folder)
        path.write_bytes(content)
    storage.read(folder)


def test_an_extra_file_is_refused_naming_it(folder: Path) -> None:
    extra = storage.read(folder).payload / "golden" / "extra.jpg"
    extra.write_bytes(b"x")
    with pytest.raises(BundleError, match=r"golden/extra\.jpg is not listed"):
        storage.read(folder)


def test_the_error_of_a_missing_bundle_names_the_command_that_makes_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match="fledge export"):
            storage.read(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="file"):
        storage.read(tmp_path / "file")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "golden/../../secret", "link"])
def test_a_path_outside_the_payload_is_refused(folder: Path, name: str) -> None:
    secret = folder / "secret"
    secret.write_text("x")
    (storage.read(folder).payload / "link").symlink_to(secret)

    def add_file(values: dict) -> None:
        values["files"][name] = {"sha256": storage.sha256(secret), "bytes": 1}

    edit(folder, add_file)
    with pytest.raises(BundleError, match="outside the bundle"):
        storage.read(folder)


@pytest.mark.parametrize("version", ["", ".", "..", "a/b", "../bundle", "/tmp"])
def test_a_version_that_is_not_a_folder_name_is_refused(folder: Path, version: str) -> None:
    edit(folder, lambda values: values.update(version=version))
    with pytest.raises(BundleError, match="version is not a folder name"):
        storage.read(folder)


def _unlist(values: dict) -> None:
    del values["files"]["model.onnx"]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(schema=2),
        lambda values: values.update(surprise=1),
        lambda values: values.pop("labels"),
        lambda values: values.update(labels=3),
        lambda values: values.update(files=[]),
        lambda values: values.update(precisions=[]),
        lambda values: values["files"].update({"README.md": None}),
        lambda values: values["preprocess"].update(size=1),
        lambda values: values["preprocess"].update(surprise=1),
        lambda values: values["views"][0].update(surprise=1),
        lambda values: values["views"][0].update(flip=True),
        lambda values: values.update(views=[]),
        lambda values: values.update(temperature=0),
        lambda values: values.update(temperature=float("inf")),
        lambda values: values.update(temperature="warm"),
        lambda values: values["precisions"]["fp32"].update(file="other.onnx"),
        lambda values: values["golden"][0].update(file="golden/9.jpg"),
        lambda values: values.update(torchscript="model.ts"),
        lambda values: values.update(torchscript={}),
        lambda values: values.update(version=5),
        lambda values: values.update(thresholds=None),
        lambda values: values["thresholds"].update(confident="high"),
        lambda values: values.update(average="median"),
        lambda values: values["views"][1].update(zoom=0),
        lambda values: values["views"][1].update(zoom=1e307, x=0, y=0),
        lambda values: values["views"][1].update(x=2.0),
        lambda values: values.update(labels=[]),
        lambda values: values.update(labels=[1, 2, 3]),
        lambda values: values["files"].update({"a\0b": {"sha256": "0", "bytes": 1}}),
        _unlist,
    ],
)
def test_an_invalid_manifest_is_refused_in_one_line(
    folder: Path, change: Callable[[dict], None]
) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=r"^[^\n]*$") as caught:
        storage.read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("labels"), "labels is missing"),
        (lambda values: values.update(surprise=1), "surprise is an unknown field"),
        (lambda values: values.update(temperature=0), "temperature = 0: input should be greater"),
        (
            lambda values: values["files"]["README.md"].pop("sha256"),
            r"README\.md\.sha256 is missing",
        ),
        (lambda values: values["views"][1].update(x=2.0), r"views\.1\.x = 2\.0: input should be"),
        (
            lambda values: values["golden"][0].update(file=1),
            r"golden\.0\.file = 1: input should be",
        ),
    ],
)
def test_the_error_of_an_invalid_manifest_names_the_field(
    folder: Path, change: Callable[[dict], None], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=rf"manifest\.json: not a manifest: .*{message}"):
        storage.read(folder)


def test_numbers_and_unknown_fields_of_entries_are_written_as_they_were_read(folder: Path) -> None:
    values = json.loads((folder / storage.MANIFEST).read_text())
    values["temperature"] = 1
    values["preprocess"]["mean"] = [0, 0.5, 1]
    values["precisions"]["fp32"]["note"] = "of a later version"
    values["views"][1]["zoom"] = 1
    values["thresholds"] = {"confident": 1}  # of the first version: without energy
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    assert Manifest.from_json(text).to_json() == text


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", '"x"'])
def test_other_json_is_not_a_manifest(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


def test_the_error_of_a_missing_precision_names_the_existing_ones(folder: Path) -> None:
    opened = storage.read(folder)
    assert opened.graph("fp32").read_bytes().count(b"fledge") == 1
    with pytest.raises(BundleError, match="no int8 graph; it has fp32"):
        opened.graph("int8")


class Killed(BaseException):
    """Simulates kill -9: it is not an Exception, so no handler in the code catches it."""


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("moment", ["before", "half-written", "after"])
def test_a_kill_during_a_publish_leaves_the_old_or_the_new_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, moment: str
) -> None:
    old = storage.read(folder).manifest
    replace_file, calls = storage._replace, []

    def killed(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) - 1 < step:
            replace_file(path, data)
        elif moment == "before":
            raise Killed
        elif moment == "half-written":
            path.with_name(f".{path.name}.partial").write_bytes(data[: len(data) // 2])
            raise Killed
        else:
            replace_file(path, data)
            raise Killed

    monkeypatch.setattr(storage, "_replace", killed)
    with pytest.raises(Killed):
        tiny_bundle(folder, seed=1)
    monkeypatch.undo()
    version = storage.read(folder).manifest.version
    renamed = step == 2 or (step == 1 and moment == "after")
    assert (version != old.version) == renamed
    # Files that the killed export left do not affect the next export.
    tiny_bundle(folder, seed=2)
    assert storage.read(folder).manifest.version not in (old.version, version)
    assert len((folder / storage.CHECKSUM).read_text().split()) == 2


def test_a_version_published_while_the_manifest_is_read_is_not_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_limited, published = storage.read_limited, []

    def slow(path: Path, most: int) -> bytes:
        data = read_limited(path, most)
        if path.name == storage.MANIFEST and not published:
            published.append(path)
            tiny_bundle(folder, seed=1)
        return data

    old = storage.read(folder).manifest.version
    monkeypatch.setattr(storage, "read_limited", slow)
    assert storage.read(folder).manifest.version != old


def test_a_concurrent_reader_gets_the_old_or_the_new_version(folder: Path) -> None:
    manifests = [storage.read(tiny_bundle(folder, seed=seed)).manifest for seed in (0, 1)]
    stop = threading.Event()

    def alternate() -> None:
        turn = 0
        while not stop.is_set():
            storage.publish(manifests[turn % 2], folder)
            turn += 1
            time.sleep(0.002)  # a hundred exports a second are enough

    writer = threading.Thread(target=alternate)
    writer.start()
    try:
        for _ in range(100):
            assert storage.read(folder).manifest in manifests
    finally:
        stop.set()
        writer.join()


def test_the_version_changes_with_what_decides_answers_and_with_nothing_else(folder: Path) -> None:
    base = storage.read(folder).manifest
    graphs = {"a.onnx": "1", "b.onnx": "2"}
    versions = {content_version(base, graphs)}
    assert content_version(base, {"b.onnx": "2", "a.onnx": "1"}) in versions
    reports = {"tuning": {"x": 1}, "parity": {"x": 1}, "tta": {"x": 1}}
    same = base.model_copy(update={"name": "x", "version": "x", **reports})
    assert content_version(same, graphs) in versions
    for other in ({"a.onnx": "1", "b.onnx": "3"}, {"a.onnx": "1"}):
        versions.add(content_version(base, other))
    changes: list[dict[str, Any]] = [
        {"labels": base.labels[::-1]},
        {"preprocess": Preprocess(size=192)},
        {"preprocess": Preprocess(background=(0, 0, 0))},
        {"temperature": 1.5},
        {"thresholds": {"confident": 0.5, "energy": None}},
        {"thresholds": {"confident": None, "energy": -5.0}},
        {"views": VIEWS[:2]},
        {"views": (VIEWS[0], VIEWS[2], VIEWS[1])},
        {"average": "log_mean"},
    ]
    versions |= {content_version(base.model_copy(update=change), graphs) for change in changes}
    assert len(versions) == 3 + len(changes)
    assert all(len(version) == 12 and int(version, 16) >= 0 for version in versions)


def test_describe_files_lists_size_and_sha256_of_every_file(folder: Path) -> None:
    opened = storage.read(folder)
    described = storage.describe_files(opened.payload)
    assert described == opened.manifest.files
    for name, facts in described.items():
        data = (opened.payload / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_a_manifest_with_nan_is_never_written(folder: Path) -> None:
    manifest = storage.read(folder).manifest.model_copy(update={"temperature": float("nan")})
    before = (folder / storage.MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.publish(manifest, folder)
    assert (folder / storage.MANIFEST).read_bytes() == before


SCHEMA_FILE = Path(__file__).parents[3] / "docs/manifest.schema.json"
SCHEMA = json.loads(SCHEMA_FILE.read_text())


def test_the_published_schema_is_current() -> None:
    """To update it: python -m serving.bundle.manifest > docs/manifest.schema.json."""
    command = [sys.executable, "-m", "serving.bundle.manifest"]
    root = SCHEMA_FILE.parents[1]
    printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert printed == SCHEMA_FILE.read_text()


def test_the_schema_has_every_field_and_accepts_a_real_manifest(folder: Path) -> None:
    fields = [field.alias or name for name, field in Manifest.model_fields.items()]
    assert list(SCHEMA["properties"]) == fields
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads((folder / storage.MANIFEST).read_text()), SCHEMA)


@pytest.mark.parametrize("name", SCHEMA["required"])
def test_the_schema_names_a_missing_field(folder: Path, name: str) -> None:
    values = json.loads((folder / storage.MANIFEST).read_text())
    del values[name]
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(values, SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(surprise=1),
        lambda values: values.update(schema=2),
        lambda values: values.update(labels=[]),
        lambda values: values.update(version="../x"),
        lambda values: values.update(temperature=0),
        lambda values: values.update(average="median"),
        lambda values: values["precisions"].pop("fp32"),
        lambda values: values["precisions"].update(fp8={"file": "x"}),
        lambda values: values["precisions"]["fp32"].update(file="../x"),
        lambda values: values["files"].update({"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}),
        lambda values: values["files"]["model.onnx"].update(sha256="short"),
        lambda values: values["preprocess"].update(size="large"),
        lambda values: values["golden"][0]["probabilities"].update(fp32=[2]),
    ],
)
def test_the_schema_refuses_what_an_export_never_writes(
    folder: Path, change: Callable[[dict], None]
) -> None:
    values = json.loads((folder / storage.MANIFEST).read_text())
    change(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)
