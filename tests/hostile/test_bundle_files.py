"""FIFOs, devices, sockets and huge files in a bundle are refused in one line, within seconds."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.bundle import storage
from serving.errors import BundleError
from serving.utils.regular_files import open_regular, read_limited
from tests.hostile.graphs import allocate, fifo, loop, with_graph
from tests.support.tiny_bundle import altered, tiny_bundle

ROOT = Path(__file__).parents[2]
MEMORY = 3 * 2**30  # of addresses; a command on a good bundle takes 1.5


def payload(folder: Path, name: str = "model.onnx") -> Path:
    return folder / storage.read(folder).manifest.version / name


def payload_fifo(folder: Path) -> None:
    fifo(payload(folder))


def golden_fifo(folder: Path) -> None:
    fifo(payload(folder, "golden/1.jpg"))


def manifest_fifo(folder: Path) -> None:
    fifo(folder / storage.MANIFEST)


def checksum_fifo(folder: Path) -> None:
    fifo(folder / storage.CHECKSUM)


def signature_fifo(folder: Path) -> None:
    fifo(folder / storage.SIGNATURE)


def unlisted_fifo(folder: Path) -> None:
    fifo(payload(folder, "golden/9.jpg"))


def payload_socket(folder: Path) -> None:
    path = payload(folder)
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def manifest_endless(folder: Path) -> None:
    (folder / storage.MANIFEST).unlink()
    (folder / storage.MANIFEST).symlink_to("/dev/zero")


def checksum_endless(folder: Path) -> None:
    (folder / storage.CHECKSUM).unlink()
    (folder / storage.CHECKSUM).symlink_to("/dev/zero")


def signature_endless(folder: Path) -> None:
    (folder / storage.SIGNATURE).symlink_to("/dev/zero")


def payload_is_terminal(folder: Path) -> None:
    path = payload(folder)
    path.unlink()
    path.symlink_to("/dev/ptmx")


def signature_lines(folder: Path) -> None:
    line = "ed25519 " + "A" * 43 + "= " + "A" * 86 + "==\n"
    (folder / storage.SIGNATURE).write_text(line * 400_000)


def sparse_manifest(folder: Path) -> None:
    os.truncate(folder / storage.MANIFEST, 2**40)


def sparse_checksum(folder: Path) -> None:
    os.truncate(folder / storage.CHECKSUM, 2**40)


def sparse_payload(folder: Path) -> None:
    os.truncate(payload(folder), 2**40)


def sparse_golden(folder: Path) -> None:
    os.truncate(payload(folder, "golden/0.jpg"), 2**40)


def sparse_payload_as_stated(folder: Path) -> None:
    """The manifest states the size; hashing the file would take an hour."""
    old = storage.read(folder).manifest
    facts = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 2**40}
    os.truncate(folder / old.version / "README.md", 2**40)
    storage.publish(old.model_copy(update={"files": {**old.files, "README.md": facts}}), folder)


def links_in_a_circle(folder: Path) -> None:
    path = payload(folder)
    path.unlink()
    path.symlink_to(path.name)


def payload_is_folder(folder: Path) -> None:
    path = payload(folder)
    path.unlink()
    path.mkdir()


def deep_folders(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(payload(folder, "golden"))
    try:
        for _ in range(30):  # a path of 6,000 characters; the longest has 4,096
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(here)


def many_folders(folder: Path) -> None:
    golden = payload(folder, "golden")
    for number in range(1200):
        (golden / str(number)).mkdir()


def long_name(folder: Path) -> None:
    old = storage.read(folder).manifest
    name = "a/" * 100_000 + "b"
    facts = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    storage.publish(old.model_copy(update={"files": {**old.files, name: facts}}), folder)


def link_outside(folder: Path) -> None:
    path = payload(folder, "README.md")
    outside = folder.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


CASES: list[Callable[[Path], None]] = [
    *(payload_fifo, golden_fifo, manifest_fifo, checksum_fifo, signature_fifo, unlisted_fifo),
    *(payload_socket, manifest_endless, checksum_endless, signature_endless, payload_is_terminal),
    *(signature_lines, sparse_manifest, sparse_checksum, sparse_payload, sparse_golden),
    *(sparse_payload_as_stated, links_in_a_circle, payload_is_folder, deep_folders, many_folders),
    *(long_name, link_outside),
]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_hostile_file_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    make(folder)
    started = time.monotonic()
    with pytest.raises(BundleError) as refused:
        storage.read(folder)
    assert time.monotonic() - started < 2
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert "bundle" in str(refused.value)


def fledge(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command within a limit of memory, for a minute at most."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    return subprocess.run(
        [sys.executable, "-m", "fledge", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit,
        check=False,
    )


@pytest.mark.process
@pytest.mark.parametrize("make", [payload_fifo, manifest_fifo, manifest_endless, signature_lines])
def test_commands_refuse_a_hostile_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    make(folder)
    table = tmp_path / "scores.csv"
    for command in (
        ["inspect", folder],
        ["verify", folder],
        ["serve", folder, "--port", "1"],
        ["score", ROOT / "docs", "--bundle", folder, "--out", table],
    ):
        done = fledge(*command)
        assert done.returncode == 78 or command[0] in ("serve", "score"), done.stderr
        assert done.returncode in (2, 78)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("fledge: ")


@pytest.mark.process
def test_a_good_bundle_is_described_and_verified_within_the_same_limits(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    done = fledge("inspect", folder), fledge("verify", folder)
    assert [one.returncode for one in done] == [0, 0], done
    assert "largest difference" in done[1].stdout


GRAPHS = {"loop": loop(2**62), "eight gigabytes": allocate(2**31), "too large": allocate(2**50)}


@pytest.mark.process
@pytest.mark.parametrize("name", GRAPHS)
def test_commands_refuse_a_graph_that_never_ends_or_takes_all_memory(
    tmp_path: Path, name: str
) -> None:
    folder = with_graph(tmp_path / "bundle", GRAPHS[name])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(payload(folder, "golden/0.jpg").read_bytes())
    for command in (
        ["verify", folder],
        ["score", tmp_path / "photos", "--bundle", folder, "--out", tmp_path / "a.csv"],
    ):
        started = time.monotonic()
        done = fledge(*command, FLEDGE_LOAD_TIMEOUT="4")
        assert done.returncode == 78, done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "must not be served" in done.stderr
        assert ("FLEDGE_LOAD_TIMEOUT" in done.stderr) == (name == "loop")
        assert time.monotonic() - started < 20
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.process
def test_a_wrong_time_limit_is_refused(tmp_path: Path) -> None:
    done = fledge("verify", tiny_bundle(tmp_path / "bundle"), FLEDGE_LOAD_TIMEOUT="soon")
    assert done.returncode == 2
    assert "FLEDGE_LOAD_TIMEOUT" in done.stderr


def test_an_unchanged_bundle_with_links_inside_is_good(tmp_path: Path) -> None:
    """As Kubernetes mounts files: links to a folder beside them."""
    folder = tiny_bundle(tmp_path / "bundle")
    for name in (storage.MANIFEST, storage.CHECKSUM):
        (folder / "data").mkdir(exist_ok=True)
        (folder / name).rename(folder / "data" / name)
        (folder / name).symlink_to(Path("data", name))
    path = payload(folder)
    path.rename(path.with_name("golden") / "graph")
    path.symlink_to("golden/graph")
    with pytest.raises(BundleError, match="golden/graph is not listed"):
        storage.read(folder)
    (path.parent / "golden/graph").rename(folder / "graph")
    path.unlink()
    path.symlink_to("../graph")
    with pytest.raises(BundleError, match="lies outside"):
        storage.read(folder)
    path.unlink()
    (folder / "graph").rename(path)
    assert storage.read(folder).manifest.name == "tiny"
    version = path.parent
    version.rename(tmp_path / "elsewhere")
    version.symlink_to(tmp_path / "elsewhere")
    assert storage.read(folder).manifest.name == "tiny"
    assert altered(folder, name="other").name == "other"


def test_files_that_end_and_files_that_do_not(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert read_limited(path, 3) == b"abc"
    with pytest.raises(OSError, match="larger than 2 bytes"):
        read_limited(path, 2)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_limited(link, 3) == b"abc"
    for wrong in ("/dev/zero", "/dev/null", "/dev/tty"):
        with pytest.raises(OSError, match="not a regular file"), open_regular(Path(wrong)):
            pass
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(OSError, match="changed while it was read"):
        read_limited(Path("/proc/self/status"), 100_000)
