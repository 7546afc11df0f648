"""Tar archives: every image has a unique name, and the name gives its bytes."""

import io
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from serving.errors import BrokenImage, DataError, TooLarge
from serving.inputs import sources
from serving.inputs.compression import MAX_FILE
from tests.support.tar_files import KINDS, find_all, only_images, shard_members, write_tar
from tests.support.tiny_bundle import photo

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
@pytest.mark.parametrize("suffix", KINDS)
def test_every_image_of_an_archive_has_its_own_bytes(
    folder: Path, reader: sources.Reader, suffix: str, order: str
) -> None:
    members = shard_members()
    name = write_tar(f"a{suffix}", members.items(), KINDS[suffix])
    expected = {f"{name}::{member}": data for member, data in only_images(members).items()}
    names = find_all(name)
    assert names == list(expected)
    if order != "forwards":
        names.reverse() if order == "backwards" else random.Random(1).shuffle(names)
    assert {name: reader.load(name) for name in names} == expected


def test_the_first_bytes_determine_the_compression(folder: Path, reader: sources.Reader) -> None:
    write_tar("a.tar", [("x.jpg", b"x")], "w:xz")
    write_tar("b.tar.gz", [("BZh.jpg", b"b")])
    write_tar("C.TGZ", [("c.jpg", b"c")], "w:bz2")
    names = find_all("a.tar", "b.tar.gz", "C.TGZ")
    assert names == ["a.tar::x.jpg", "b.tar.gz::BZh.jpg", "C.TGZ::c.jpg"]
    assert [reader.load(name) for name in names] == [b"x", b"b", b"c"]


def test_zstd_archives_are_read_if_zstandard_is_installed(
    folder: Path, reader: sources.Reader
) -> None:
    zstandard = pytest.importorskip("zstandard")
    members = shard_members()
    data = zstandard.compress(Path(write_tar("a.tar", members.items())).read_bytes())
    Path("a.tar.zst").write_bytes(data)
    Path("b.tar.zst").write_bytes(data[: len(data) // 2])
    Path("c.tar.zst").write_bytes(data[:5] + b"\xff" * 1000)
    loaded = [reader.load(name) for name in find_all("a.tar.zst")]
    assert loaded == list(only_images(members).values())
    for name in ("b.tar.zst", "c.tar.zst"):
        with pytest.raises(BrokenImage, match=r"the archive is (broken|cut off)"):
            reader.load(f"{name}::039.jpg")


def test_the_error_for_zstd_without_zstandard_names_the_remedy(
    folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    Path("a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 600)
    with pytest.raises(
        DataError,
        match=r"a\.tar\.zst: compressed by zstd, which needs zstandard: pip install zstandard",
    ):
        find_all("a.tar.zst")
    with pytest.raises(BrokenImage, match="compressed by zstd"):
        sources.Reader().load("a.tar.zst::x.jpg")


def test_images_are_listed_in_the_order_of_the_archive(folder: Path) -> None:
    names = ["10.jpg", "./9.PNG", "a/", "a/1.jpg", "a/n.txt", ".h.jpg", "a/._1.jpg", ".git/1.jpg"]
    write_tar(
        "a.tar", [(name, None if name.endswith("/") else b"x") for name in [*names, "x.jpg/"]]
    )
    assert find_all("a.tar") == ["a.tar::10.jpg", "a.tar::./9.PNG", "a.tar::a/1.jpg"]


def test_a_member_name_with_dots_writes_nothing(folder: Path, reader: sources.Reader) -> None:
    (folder / "in").mkdir()
    os.chdir("in")
    names = ["../../up.jpg", "/tmp/fledge-root.jpg", "a/../../x.jpg"]
    write_tar("a.tar", [(name, name.encode()) for name in names])
    before = sorted(folder.rglob("*"))
    assert find_all("a.tar") == [f"a.tar::{name}" for name in names]
    assert [reader.load(f"a.tar::{name}").decode() for name in names] == names
    assert sorted(folder.rglob("*")) == before
    assert not Path("/tmp/fledge-root.jpg").exists()


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_unusual_names_are_unchanged(
    folder: Path, reader: sources.Reader, kind: int
) -> None:
    latin = os.fsdecode(b"latin-\xfc\xff.jpg")
    names = ["d/" * 150 + "x.jpg", "y" * 300 + ".jpg", "ünï-花.jpg", latin, "a::b.jpg", "c\nd.jpg"]
    write_tar(
        "a.tar", [(name, name.encode("utf-8", "surrogateescape")) for name in names], format=kind
    )
    assert find_all("a.tar") == [f"a.tar::{name}" for name in names]
    for name in names:
        assert reader.load(f"a.tar::{name}").decode("utf-8", "surrogateescape") == name


def test_holes_of_sparse_members_are_zeros(folder: Path, reader: sources.Reader) -> None:
    for suffix in (".tar", ".tar.gz"):
        with tarfile.open(f"a{suffix}", KINDS[suffix]) as file:
            info = tarfile.TarInfo("x.jpg")
            info.size = 1024
            blocks = {"map": "1000,512,200000,512", "size": "300000", "numblocks": "2"}
            info.pax_headers = {f"GNU.sparse.{key}": value for key, value in blocks.items()}
            file.addfile(info, io.BytesIO(b"a" * 512 + b"b" * 512))
        data = reader.load(f"a{suffix}::x.jpg")
        expected = bytearray(300_000)
        expected[1000:1512], expected[200_000:200_512] = b"a" * 512, b"b" * 512
        assert data == expected


def test_links_devices_and_too_large_members_are_errors(
    folder: Path, reader: sources.Reader
) -> None:
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    for suffix in (".tar", ".tar.gz"):
        with tarfile.open(f"a{suffix}", KINDS[suffix]) as file:
            for number, kind in enumerate(kinds):
                info = tarfile.TarInfo(f"{number}.jpg")
                info.type, info.linkname = kind, "/etc/hostname"
                file.addfile(info)
            file.addfile(tarfile.TarInfo("empty.jpg"))
            info = tarfile.TarInfo("giant.jpg")
            info.size = MAX_FILE + 1
            file.addfile(info)
        names = find_all(f"a{suffix}")
        assert len(names) == 6
        assert reader.load(names[4]) == b""
        for name in names[:4]:
            with pytest.raises(BrokenImage, match=r"not a file but a (link|device)"):
                reader.load(name)
        with pytest.raises(TooLarge, match="400000001 bytes are more"):
            reader.load(names[5])


def test_a_repeated_name_gets_a_number(folder: Path, reader: sources.Reader) -> None:
    for suffix in (".tar", ".tar.gz"):
        members = [("x.jpg", b"1"), ("2::x.jpg", b"2"), ("x.jpg", b"3"), ("x.jpg", b"4")]
        name = write_tar(f"a{suffix}", members, KINDS[suffix])
        names = find_all(name)
        assert names == [f"{name}::{m}" for m in ("x.jpg", "2::x.jpg", "3::x.jpg", "4::x.jpg")]
        assert [reader.load(name) for name in reversed(names)] == [b"4", b"3", b"2", b"1"]


def test_an_existing_file_takes_precedence_over_a_member(
    folder: Path, reader: sources.Reader
) -> None:
    (folder / "d::e.tar").mkdir()
    (folder / "d::e.tar/f::g.jpg").write_bytes(b"plain")
    write_tar("a.tar", [("x.jpg", b"member"), ("y.jpg", b"y")])
    write_tar("d::e.tar/b::c.tar", [("x::y.jpg", b"colons")])
    (folder / "a.tar::x.jpg").write_bytes(b"beside")
    notes: list[str] = []
    names = find_all("a.tar", "d::e.tar", "d::e.tar/b::c.tar", notes=notes)
    assert names == [
        *("a.tar::y.jpg", "d::e.tar/f::g.jpg", "d::e.tar/b::c.tar::x::y.jpg"),
    ]
    assert notes == [
        "a.tar::x.jpg: a file beside the archive has that name; the member is left out"
    ]
    assert [reader.load(name) for name in names] == [b"y", b"plain", b"colons"]
    assert reader.load("a.tar::x.jpg") == b"beside"


def test_a_member_name_is_an_input_and_a_line_of_a_list(
    folder: Path, reader: sources.Reader
) -> None:
    names = find_all(write_tar("a.tar.gz", shard_members().items(), "w:gz"))
    Path("list.txt").write_text("\n".join(names))
    assert find_all("list.txt") == names
    assert find_all(*names[3:5]) == names[3:5]
    with pytest.raises(BrokenImage, match="no image of that name in the archive"):
        reader.load("a.tar.gz::gone.jpg")
    assert reader.load(names[-1])


def test_another_process_can_read_a_member_by_its_name(folder: Path) -> None:
    name = find_all(write_tar("a.tar", [("x.jpg", photo(1))]))[0]
    code = """
import sys
from serving.inputs.sources import Reader
print(len(Reader().load(sys.argv[1])))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(photo(1))


def test_shards_are_found_by_braces_and_patterns(folder: Path, reader: sources.Reader) -> None:
    for number in range(12):
        write_tar(f"data-{number:03}.tar", [("x.jpg", b"%d" % number)])
    names = [f"data-{number:03}.tar::x.jpg" for number in range(12)]
    assert (
        find_all("data-{000..011}.tar")
        == find_all("*.tar")
        == find_all("data-{00,01}?.tar")
        == names
    )
    assert [reader.load(name) for name in names] == [b"%d" % number for number in range(12)]
    with pytest.raises(DataError, match=r"data-012\.tar: not there"):
        find_all("data-{000..012}.tar")
    with pytest.raises(DataError, match="matches no images"):
        find_all("data-*")  # has no suffix of archives
