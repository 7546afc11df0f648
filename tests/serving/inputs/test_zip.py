"""Zip archives: every image has a unique name, and the name gives its bytes."""

import io
import os
import random
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from serving.errors import BrokenImage, DataError, TooLarge
from serving.inputs import sources, zip_archive
from tests.support.tar_files import KINDS, find_all, only_images, shard_members, write_tar
from tests.support.tiny_bundle import photo
from tests.support.zip_files import end_record, entry, local, write_zip


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2], ids=str
)
def test_every_image_of_a_zip_has_its_own_bytes(
    folder: Path, reader: sources.Reader, method: int, order: str
) -> None:
    members = shard_members()
    write_zip("photos.zip", members.items(), method)
    expected = {f"photos.zip::{name}": data for name, data in only_images(members).items()}
    names = find_all("photos.zip")
    assert names == list(expected)
    if order != "forwards":
        names.reverse() if order == "backwards" else random.Random(1).shuffle(names)
    assert {name: reader.load(name) for name in names} == expected


def test_the_first_bytes_determine_that_a_file_is_a_zip(
    folder: Path, reader: sources.Reader
) -> None:
    write_zip("a.tar", [("x.jpg", b"x")])
    write_zip("B.ZIP", [("y.jpg", b"y")])
    names = find_all("a.tar", "B.ZIP")
    assert names == ["a.tar::x.jpg", "B.ZIP::y.jpg"]
    assert [reader.load(name) for name in names] == [b"x", b"y"]


def test_a_zip_is_found_by_patterns_and_in_lists(folder: Path, reader: sources.Reader) -> None:
    for number in range(3):
        write_zip(f"part-{number}.zip", [("x.jpg", b"%d" % number)])
    names = [f"part-{number}.zip::x.jpg" for number in range(3)]
    assert find_all("part-{0..2}.zip") == find_all("*.zip") == names
    Path("list.txt").write_text("\n".join(names))
    assert find_all("list.txt") == names
    assert [reader.load(name) for name in names] == [b"0", b"1", b"2"]
    with pytest.raises(BrokenImage, match="no image of that name in the archive"):
        reader.load("part-0.zip::gone.jpg")


def test_hidden_members_and_those_of_macos_are_left_out(folder: Path) -> None:
    names = ["10.jpg", "a/", "a/1.JPG", "__MACOSX/a/._1.JPG", "__MACOSX/2.jpg", ".git/1.jpg"]
    write_zip("a.zip", [(name, b"x" if not name.endswith("/") else b"") for name in names])
    assert find_all("a.zip") == ["a.zip::10.jpg", "a.zip::a/1.JPG"]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_images_without_a_known_suffix_are_recognised_by_their_content(
    folder: Path, reader: sources.Reader, suffix: str
) -> None:
    images = {"b/IMG_1": photo(1), "2.jpg": b"named", "3.photo": photo(3), "4.pgm": photo(4)}
    others = {"README": b"text", "5.cls": b"7", "6.txt": photo(6), ".7": photo(7), "8.jpg~": b"x"}
    members = [*images.items(), *others.items()]
    name = f"a{suffix}"
    write_zip(name, members) if suffix == ".zip" else write_tar(name, members, KINDS[suffix])
    assert find_all(name) == [f"{name}::{member}" for member in images]
    assert {member: reader.load(f"{name}::{member}") for member in images} == images


def test_a_member_name_with_dots_writes_nothing(folder: Path, reader: sources.Reader) -> None:
    (folder / "in").mkdir()
    os.chdir("in")
    names = ["../../up.jpg", "/tmp/fledge-root.jpg", "a/../../x.jpg"]
    write_zip("a.zip", [(name, name.encode()) for name in names])
    before = sorted(folder.rglob("*"))
    assert find_all("a.zip") == [f"a.zip::{name}" for name in names]
    assert [reader.load(f"a.zip::{name}").decode() for name in names] == names
    assert sorted(folder.rglob("*")) == before
    assert not Path("/tmp/fledge-root.jpg").exists()


def test_a_repeated_name_gets_a_number(folder: Path, reader: sources.Reader) -> None:
    members = [("x.jpg", b"1"), ("2::x.jpg", b"2"), ("x.jpg", b"3"), ("x.jpg", b"4")]
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip("a.zip", members)
    names = find_all("a.zip")
    assert names == [f"a.zip::{name}" for name in ("x.jpg", "2::x.jpg", "3::x.jpg", "4::x.jpg")]
    assert [reader.load(name) for name in reversed(names)] == [b"4", b"3", b"2", b"1"]


@pytest.mark.parametrize(
    ("raw", "flags", "system", "extra", "name"),
    [
        ("été/1.jpg".encode(), 0x800, 3, b"", "été/1.jpg"),
        ("été/1.jpg".encode(), 0, 3, b"", "été/1.jpg"),  # by macOS, without the mark
        ("été/1.jpg".encode("cp437"), 0, 0, b"", "été/1.jpg"),
        (b"a\\1.jpg", 0, 0, b"", "a/1.jpg"),  # by .NET
        (b"a\\1.jpg", 0, 3, b"", "a\\1.jpg"),  # on Unix it is a letter
        (b"?.jpg", 0, 0, "unicode", "花.jpg"),
        (b"?.jpg", 0, 0, "unicode of another name", "?.jpg"),
        (b"\xff.jpg", 0x800, 3, b"", os.fsdecode(b"\xff.jpg")),
    ],
)
def test_names_are_decoded_by_their_mark_and_their_bytes(
    folder: Path,
    reader: sources.Reader,
    raw: bytes,
    flags: int,
    system: int,
    extra: bytes | str,
    name: str,
) -> None:
    if isinstance(extra, str):
        crc = zlib.crc32(raw if extra == "unicode" else b"another")
        body = b"\1" + crc.to_bytes(4, "little") + "花.jpg".encode()
        extra = struct.pack("<2H", 0x7075, len(body)) + body
    head = local(raw, b"data", flags=flags)
    directory = entry(raw, b"data", flags=flags, system=system, extra=extra)
    Path("a.zip").write_bytes(head + directory + end_record(1, len(directory), len(head)))
    assert find_all("a.zip") == [f"a.zip::{name}"]
    assert reader.load(f"a.zip::{name}") == b"data"


def test_an_archive_behind_other_data_and_before_a_comment_is_read(
    folder: Path, reader: sources.Reader
) -> None:
    write_zip("a.zip", [("x.jpg", b"data"), ("y.jpg", b"more")], comment=b"PK\5\6 is a mark")
    Path("b.zip").write_bytes(b"#!/bin/sh\nexit\n" + Path("a.zip").read_bytes())
    names = find_all("b.zip")
    assert [reader.load(name) for name in names] == [b"data", b"more"]


def test_zip64_is_read(folder: Path, reader: sources.Reader) -> None:
    with (
        zipfile.ZipFile("a.zip", "w", allowZip64=True) as archive,
        archive.open(zipfile.ZipInfo("x.jpg"), "w", force_zip64=True) as file,
    ):
        file.write(b"wide")
    data = Path("a.zip").read_bytes()
    at = data.index(b"PK\1\2")
    # All numbers of the directory and of the end are in the records of zip64.
    size, packed, header = 4, 4, 0
    wide = struct.pack("<2H3Q", 1, 24, size, packed, header)
    directory = entry(b"x.jpg", b"wide", extra=wide, in_zip64=True)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), at)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at + len(directory), 1)
    end = end_record(0xFFFF, 2**32 - 1, 2**32 - 1)
    for before in (b"", b"other data"):
        Path("a.zip").write_bytes(before + data[:at] + directory + end64 + locator + end)
        assert [reader.load(name) for name in find_all("a.zip")] == [b"wide"]


def test_links_and_encrypted_members_are_errors_of_their_rows(
    folder: Path, reader: sources.Reader
) -> None:
    with zipfile.ZipFile("a.zip", "w") as archive:
        for name, mode in (("link.jpg", stat.S_IFLNK), ("pipe.jpg", stat.S_IFIFO)):
            info = zipfile.ZipInfo(name)
            info.external_attr, info.create_system = (mode | 0o777) << 16, 3
            archive.writestr(info, "/etc/hostname")
        archive.writestr("ok.jpg", b"ok")
    head = local(b"x.jpg", b"data", flags=1)
    directory = entry(b"x.jpg", b"data", flags=1)
    Path("b.zip").write_bytes(head + directory + end_record(1, len(directory), len(head)))
    expected = {
        "a.zip::link.jpg": "not a file but a link in an archive",
        "a.zip::pipe.jpg": "not a file but a device or a pipe in an archive",
        "b.zip::x.jpg": "encrypted; unpack the archive with its password",
    }
    assert set(find_all("a.zip", "b.zip")) == {*expected, "a.zip::ok.jpg"}
    for name, message in expected.items():
        with pytest.raises(BrokenImage, match=message):
            reader.load(name)
    assert reader.load("a.zip::ok.jpg") == b"ok"


@pytest.mark.parametrize(
    ("method", "word"), [(9, "Deflate64"), (14, "LZMA"), (93, "Zstandard"), (77, "method 77")]
)
def test_another_compression_is_named(
    folder: Path, reader: sources.Reader, method: int, word: str
) -> None:
    head = local(b"x.jpg", b"data", method=method)
    directory = entry(b"x.jpg", b"data", method=method)
    Path("a.zip").write_bytes(head + directory + end_record(1, len(directory), len(head)))
    with pytest.raises(BrokenImage, match=f"compressed by {word}, which is not read; unpack"):
        reader.load("a.zip::x.jpg")


def test_a_damaged_member_is_an_error_of_its_row(folder: Path, reader: sources.Reader) -> None:
    write_zip("a.zip", [("x.jpg", b"xx"), ("y.jpg", b"yy"), ("z.jpg", b"zz")])
    data = bytearray(Path("a.zip").read_bytes())
    data[data.index(b"xx")] ^= 1
    data[data.index(b"y.jpg")] = ord("Y")
    Path("a.zip").write_bytes(data)
    assert find_all("a.zip") == ["a.zip::x.jpg", "a.zip::y.jpg", "a.zip::z.jpg"]
    with pytest.raises(BrokenImage, match="its checksum is wrong; the archive is damaged"):
        reader.load("a.zip::x.jpg")
    with pytest.raises(BrokenImage, match="another member where its directory says"):
        reader.load("a.zip::y.jpg")
    assert reader.load("a.zip::z.jpg") == b"zz"


@pytest.mark.parametrize(
    ("stated", "message"),
    [(3, "has more than its 3 bytes"), (900, r"has 500 of its 900 bytes")],
)
def test_a_size_that_is_not_true_is_an_error(
    folder: Path, reader: sources.Reader, stated: int, message: str
) -> None:
    write_zip("a.zip", [("x.jpg", b"a" * 500)], zipfile.ZIP_DEFLATED)
    data = bytearray(Path("a.zip").read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<L", stated)
    Path("a.zip").write_bytes(data)
    with pytest.raises(BrokenImage, match=message):
        reader.load("a.zip::x.jpg")


@pytest.mark.parametrize("cut", [0, 3, 30, 100, -1, -22])
def test_an_archive_that_is_cut_off_is_one_line(folder: Path, cut: int) -> None:
    write_zip("a.zip", [(f"{number}.jpg", bytes(100)) for number in range(3)])
    Path("a.zip").write_bytes(Path("a.zip").read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.zip: broken, or no zip archive: .*may be cut off"):
        find_all("a.zip")
    with pytest.raises(BrokenImage, match="the archive is broken"):
        sources.Reader().load("a.zip::0.jpg")


def test_a_directory_that_breaks_off_keeps_what_came_before(
    folder: Path, reader: sources.Reader
) -> None:
    write_zip("a.zip", [(f"{number}.jpg", b"%d" % number) for number in range(3)])
    data = Path("a.zip").read_bytes()
    at = data.rindex(b"PK\1\2")
    Path("a.zip").write_bytes(data[:at] + b"XX" + data[at + 2 :])
    notes: list[str] = []
    names = find_all("a.zip", notes=notes)
    assert [reader.load(name) for name in names] == [b"0", b"1"]
    assert notes == [
        "a.zip: broken: its directory can't be read after 1.jpg; what follows is left out"
    ]


def test_parts_of_a_split_archive_are_named(folder: Path) -> None:
    Path("a.zip").write_bytes(b"PK\3\4" + end_record(1, 46, 0, disk=1))
    with pytest.raises(DataError, match="one part of an archive of several; join the parts"):
        find_all("a.zip")


@pytest.mark.parametrize("name", ["photos.7z", "photos.rar", "PHOTOS.RAR"])
def test_other_archives_are_named_with_the_remedy(folder: Path, name: str) -> None:
    Path(name).write_bytes(b"7z\xbc\xaf\x27\x1c")
    with pytest.raises(DataError, match="archive is not read; unpack it, or pack it as zip or tar"):
        find_all(name)


def test_an_archive_that_expands_too_much_is_not_listed_to_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip("a.zip", [(f"{n}.jpg", bytes(2**24)) for n in range(4)], zipfile.ZIP_DEFLATED)
    notes: list[str] = []
    assert len(find_all("a.zip", notes=notes)) == 2
    assert notes == ["a.zip: it expands to more than 250 times its size; unpack it"]


def test_members_that_share_their_data_count_each(folder: Path) -> None:
    kernel = zlib.compress(bytes(2**23), 9)[2:-4]
    head = local(b"x.jpg", kernel, method=8, size=2**23)
    one = entry(b"x.jpg", kernel, method=8, size=2**23)
    directory = one * 10_000
    Path("a.zip").write_bytes(head + directory + end_record(10_000, len(directory), len(head)))
    notes: list[str] = []
    assert len(find_all("a.zip", notes=notes)) < 100
    assert "expands to more than 250 times" in notes[0]


def test_limits_of_number_and_size_hold_before_the_directory_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip("a.zip", [(f"{number}.jpg", b"x") for number in range(20)])
    monkeypatch.setattr(zip_archive, "MAX_ENTRIES", 19)
    with pytest.raises(DataError, match=r"20 members in a directory of .* are more than the 19"):
        find_all("a.zip")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(zip_archive, "MAX_DIRECTORY", 100)
    with pytest.raises(DataError, match="100 bytes allowed; unpack it"):
        find_all("a.zip")


def test_a_giant_member_is_too_large(folder: Path, reader: sources.Reader) -> None:
    head = local(b"x.jpg", b"data")
    directory = entry(b"x.jpg", b"data", size=400_000_001)
    archive = head + directory + bytes(2**21) + end_record(1, len(directory) + 2**21, len(head))
    Path("a.zip").write_bytes(archive)
    with pytest.raises(TooLarge, match="400000001 bytes are more than the 400000000 allowed"):
        reader.load("a.zip::x.jpg")


def test_a_zip_and_a_tar_are_scored_together(folder: Path, reader: sources.Reader) -> None:
    write_zip("a.zip", [("x.jpg", b"zip")])
    write_tar("b.tar", [("x.jpg", b"tar")])
    assert [reader.load(name) for name in find_all("a.zip", "b.tar")] == [b"zip", b"tar"]


def test_a_hundred_thousand_members_are_listed_in_little_memory(folder: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("0.jpg", b"")
    body = data.getvalue()
    at = body.index(b"PK\1\2")
    names = [b"%06d.jpg" % number for number in range(100_000)]
    directory = b"".join(entry(name, b"") for name in names)
    end64 = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(names), len(names), len(directory), at
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at + len(directory), 1)
    Path("a.zip").write_bytes(
        body[:at] + directory + end64 + locator + end_record(0xFFFF, 2**32 - 1, 2**32 - 1)
    )
    code = """
import resource
from serving.inputs import archives
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(1 for _ in archives.members("a.zip")) == 100_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000
