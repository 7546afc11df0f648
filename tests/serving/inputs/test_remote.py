"""Addresses: images are found and read as the same files in a local folder."""

import contextlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from serving.errors import BrokenImage, DataError, TooLarge, WorkError
from serving.inputs import local_files, remote, sources
from serving.scoring import score
from serving.scoring.options import ScoringOptions
from tests.support.tiny_bundle import photo, tiny_bundle

NAMES = (
    *("2.jpg", "10.jpg", "3/z.JPG", "a/1.png", "a/b [1]/ü#%41.jpg"),
    *("notes.txt", ".hidden.jpg", "a/._1.png", ".dark/1.jpg"),
)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def photos_folder(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> Path:
    """A folder, and the same files at memory://photos."""
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        memory.pipe_file(f"/photos/{name}", name.encode())
    return tmp_path / "photos"


def found(*words: str) -> list[str]:
    return list(sources.find(words))


@pytest.mark.parametrize("start", ["memory://photos", "file://{}", "local://{}/"])
def test_names_and_order_equal_those_of_a_local_folder(photos_folder: Path, start: str) -> None:
    here = [os.path.relpath(name, photos_folder) for name in found(str(photos_folder))]
    there = found(start.format(photos_folder))
    assert all(remote.is_address(name) for name in there)
    assert [name.partition("photos/")[2] for name in there] == here
    assert len(here) == 5


def test_each_name_is_read_to_the_bytes_of_its_file(photos_folder: Path) -> None:
    reader = sources.Reader(sources.protocols(["memory://photos"]))
    for start in ("memory://photos", f"file://{photos_folder}"):
        for name in found(start):
            assert reader.load(name).decode() == name.partition("photos/")[2]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jpg", ["2.jpg", "10.jpg"]),
        ("*", ["2.jpg", "10.jpg"]),
        ("**/*.png", ["a/1.png"]),
        ("?/z.*", ["3/z.JPG"]),
        ("*.txt", ["notes.txt"]),
        ("{10,2}.jpg", ["10.jpg", "2.jpg"]),
        ("a/b [1]/ü#%41.jpg", ["a/b [1]/ü#%41.jpg"]),
    ],
)
def test_patterns_match_files_in_natural_order(
    photos_folder: Path, pattern: str, names: list[str]
) -> None:
    matched = found(f"memory://photos/{pattern}")
    assert [name.partition("photos/")[2] for name in matched] == names


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("memory://nowhere", "memory://nowhere: not there"),
        ("memory://photos/*.gif", "no images found"),
        ("memory://photos/notes.txt", "copy it first"),
        ("memory://x.tar::a.jpg", "'::' has no meaning"),
        ("nosuch://photos", "(?i)nosuch://photos: .*protocol"),
    ],
)
def test_a_missing_address_is_one_line_before_the_first_name(
    photos_folder: Path, word: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        found(word)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(DataError, match=r"oss://x: .*ossfs"):
        found("oss://x")


def test_an_unreadable_address_is_an_error_of_one_image(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/p/empty.jpg", b"")
    memory.pipe_file("/p/big.jpg", b"12345")
    monkeypatch.setattr(remote, "MAX_FILE", 4)
    assert sources.Reader(["memory"]).load("memory://p/empty.jpg") == b""
    with pytest.raises(TooLarge, match="4 bytes"):
        sources.Reader(["memory"]).load("memory://p/big.jpg")
    with pytest.raises(BrokenImage, match="No such file"):
        sources.Reader(["memory"]).load("memory://p/gone.jpg")


def test_a_local_address_is_checked_like_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "big.jpg").write_bytes(b"12345")
    monkeypatch.setattr(local_files, "MAX_FILE", 4)
    for start in ("file://", "local://"):
        with pytest.raises(BrokenImage, match="not a file"):
            sources.Reader().load(f"{start}{tmp_path}/pipe.jpg")  # opening it would block
        with pytest.raises(TooLarge, match="5 bytes"):
            sources.Reader().load(f"{start}{tmp_path}/big.jpg")


def test_a_server_without_an_end_is_read_up_to_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = 0

    class Endless(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            nonlocal sent
            self.do_HEAD()
            with contextlib.suppress(OSError):
                while sent < 10**9:
                    self.wfile.write(bytes(10**6))
                    sent += 10**6

        def log_message(self, *words: object) -> None:
            pass

    monkeypatch.setattr(remote, "MAX_FILE", 10**6)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(TooLarge):
                sources.Reader(["http"]).load(f"http://127.0.0.1:{server.server_port}/1.jpg")
        finally:
            server.shutdown()
    assert sent < 10**8


@pytest.mark.parametrize(
    "name",
    ["http://169.254.169.254/x", "SFTP://host/1.jpg", "reference://x", "memory://p/1.jpg"],
)
def test_an_address_in_a_list_needs_the_option_addresses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_open", lambda address: pytest.fail(address))
    reader = sources.Reader(sources.protocols(["photos", "list.txt", "s3://bucket"], "gs, https"))
    kind = name.partition(":")[0].lower()
    with pytest.raises(BrokenImage, match=f"in a list: .* --addresses {kind}$"):
        reader.load(name)
    for chained in ("file://x::http://127.0.0.1/", "s3://x::memory://p/1.jpg"):
        with pytest.raises(BrokenImage, match="'::' has no meaning"):
            reader.load(chained)


def test_the_option_addresses_allows_a_protocol_in_lists(
    tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    memory.pipe_file("/p/1.jpg", photo(1))
    (tmp_path / "1.jpg").write_bytes(photo(1))
    listed = tmp_path / "list.txt"
    listed.write_text(f"memory://p/1.jpg\n{tmp_path}/1.jpg\n")
    bundle, out = tiny_bundle(tmp_path / "bundle"), tmp_path / "out.csv"
    for addresses, errors in (("", 1), ("memory", 0)):
        options = ScoringOptions(device="cpu", addresses=addresses)
        done = score.score([str(listed)], bundle, out, options, log=lambda line: None)
        assert sum(done.errors.values()) == errors


def test_the_table_of_addresses_equals_that_of_the_folder(
    tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(20):
        (folder / f"{seed}.jpg").write_bytes(photo(seed))
    (folder / "5.jpg").write_bytes(photo(5)[:700])
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"file://{folder}/{seed}.jpg\n" for seed in range(20)))
    tables = []
    for word in (str(folder), f"file://{folder}", str(listed)):
        out = tmp_path / "out.csv"
        score.score([word], bundle, out, ScoringOptions(device="cpu"), log=lambda line: None)
        tables.append(out.read_text().replace("file://", ""))
    assert tables[0] == tables[1] == tables[2]
    assert "5.jpg,error" in tables[0]


def test_a_resumed_job_does_not_list_the_folder_again(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/p/1.jpg", photo(1))
    listed: list[str] = []
    find = remote.find
    monkeypatch.setattr(remote, "find", lambda *args: (listed.append(args[0]), find(*args))[1])
    words, out = ["memory://p"], tmp_path / "out.csv"
    bundle = tiny_bundle(tmp_path / "bundle")

    def full(*_: object) -> None:
        raise WorkError("full")

    with monkeypatch.context() as patch:
        patch.setattr(score, "_write_table", full)
        with pytest.raises(WorkError, match="full"):
            score.score(words, bundle, out, ScoringOptions(device="cpu"), log=lambda line: None)
    assert listed == words
    score.score(words, bundle, out, ScoringOptions(device="cpu"), log=lambda line: None)
    assert listed == words


class ObjectStore(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Keys with slashes, listed as s3fs lists them; checked against s3fs 2026.9.0."""

    protocol = "objects"
    keys: ClassVar[list[str]] = []
    cachable = False

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[dict[str, Any]]:
        start = f"{path.rstrip('/')}/"
        inner = [key for key in self.keys if key.startswith(start)]
        folders = {start + key[len(start) :].partition("/")[0] for key in inner}
        names = {name for name in folders if any(key.startswith(f"{name}/") for key in inner)}
        files = [key for key in inner if "/" not in key[len(start) :]]
        return [
            *({"name": name, "type": "directory", "size": 0} for name in sorted(names)),
            *({"name": name, "type": "file", "size": 1} for name in files),
        ]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "type": "directory", "size": 0}

    def find(self, path: str, prefix: str = "", **kwargs: Any) -> list[str]:
        return [key for key in self.keys if key.startswith(f"{path}/{prefix}")]


class PlainStore(ObjectStore):
    protocol = "plain"

    def find(self, path: str, **kwargs: Any) -> list[str]:
        raise AssertionError("its keys can't be listed by a prefix")


KEYS = ["b/p/1.jpg", "b/p//double.jpg", "b/p///t.jpg", "b/p/q//3.jpg", "b/p/q/2.jpg", "b/p/"]
KEYS += ["b/p/1.jpg/inner.jpg", "b/p//.hidden/4.jpg", "b/p//notes.txt", "b/m/", "b/m/5.jpg"]


def test_photos_in_folders_without_a_name_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    monkeypatch.setattr(ObjectStore, "keys", KEYS)
    assert found("objects://b") == [
        f"objects://b/{name}"
        for name in (
            *("m/5.jpg", "p/1.jpg/inner.jpg", "p/1.jpg", "p/q/2.jpg", "p/q//3.jpg"),
            *("p///t.jpg", "p//double.jpg"),
        )
    ]


def test_photos_in_folders_without_a_name_that_can_not_be_listed_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec.register_implementation("plain", PlainStore, clobber=True)
    monkeypatch.setattr(ObjectStore, "keys", ["b/p/1.jpg", "b/p//double.jpg"])
    notes: list[str] = []
    assert list(sources.find(["plain://b/p"], note=notes.append)) == ["plain://b/p/1.jpg"]
    assert notes == [
        "plain://b/p//: PlainStore can't list a folder without a name; what is in it is left out"
    ]
