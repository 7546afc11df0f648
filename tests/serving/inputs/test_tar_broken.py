"""Broken tar archives: valid members are read, the rest is noted."""

import contextlib
import gzip
import io
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from serving.errors import BrokenImage, DataError, ImageError
from serving.inputs import sources, tar
from serving.inputs.compression import PeekableStream

MEMBERS = {f"{number}.jpg": bytes([number]) * 3000 for number in range(10)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(members: dict[str, bytes] = MEMBERS) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


SPAN = 512 + 3072  # a header and its data
END = len(MEMBERS) * SPAN


def read_all(data: bytes, name: str = "a.tar") -> tuple[dict[str, bytes | str], list[str]]:
    """Name -> bytes or error code; the notes."""
    Path(name).write_bytes(data)
    notes: list[str] = []
    answers: dict[str, bytes | str] = {}
    reader = sources.Reader()
    for found in sources.find([name], note=notes.append):
        member = found.removeprefix(f"{name}::")
        try:
            answers[member] = reader.load(found)
        except ImageError as error:
            answers[member] = error.code
    reader.close()
    return answers, notes


def test_a_complete_archive_gives_no_notes(folder: Path) -> None:
    assert read_all(packed()) == (MEMBERS, [])
    assert read_all(gzip.compress(packed())) == (MEMBERS, [])


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("size", "complete", "truncated"),
    [
        (END, 10, 0),
        (END + 100, 10, 0),
        (END - 50, 10, 0),  # only padding is missing
        (END - 1000, 9, 1),
        (END - 3072, 9, 1),
        (END - SPAN + 100, 9, 0),
        (END - SPAN, 9, 0),
        (3 * SPAN + 700, 3, 1),
    ],
)
def test_members_before_a_truncation_are_valid(
    folder: Path, compress: type[bytes], size: int, complete: int, truncated: int
) -> None:
    answers, notes = read_all(compress(packed()[:size]))
    expected: dict[str, bytes | str] = dict(list(MEMBERS.items())[:complete])
    expected |= {f"{complete}.jpg": "broken-image"} if truncated else {}
    assert answers == expected
    assert len(notes) == 1
    assert notes[0].startswith(("a.tar: cut off", f"a.tar: broken after {complete - 1}.jpg"))


def test_members_before_a_truncation_of_a_compressed_stream_are_valid(folder: Path) -> None:
    members = {f"{n}.jpg": random.Random(n).randbytes(3000) for n in range(10)}
    data = gzip.compress(packed(members))
    answers, notes = read_all(data[: len(data) // 2], "a.tar.gz")
    valid = [name for name, answer in answers.items() if answer == members[name]]
    assert valid == list(members)[: len(valid)]
    assert 3 <= len(valid) <= 5
    assert all(answer == "broken-image" for answer in list(answers.values())[len(valid) :])
    assert len(notes) == 1
    assert notes[0].startswith("a.tar.gz: broken after ")
    assert "what follows is left out" in notes[0]


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_broken_header_ends_an_archive(folder: Path, compress: type[bytes]) -> None:
    data = bytearray(packed())
    data[4 * SPAN + 150] ^= 1
    answers, notes = read_all(compress(bytes(data)))
    assert answers == dict(list(MEMBERS.items())[:4])
    assert notes == ["a.tar: broken after 3.jpg; what follows is left out (bad checksum)"]
    reader = sources.Reader()
    for _ in range(2):  # the second call gives the same error
        with pytest.raises(BrokenImage, match=r"the archive is broken after 3\.jpg"):
            reader.load("a.tar::7.jpg")
    assert reader.load("a.tar::2.jpg") == MEMBERS["2.jpg"]
    reader.close()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no images in it; .*cut off"),
        (b"<html>not found</html>" * 100, "no images in it; .*no tar archive"),
        (b"\x1f\x8b" + b"junk" * 500, "no images in it; .*no tar archive"),
        (b"\x1f\x8b", "no images in it; .*no tar archive"),
        (b"\0" * 10240, r"no images in it; looked for [^()]*$"),
        (
            packed({"a.txt": b"a", "b.json": b"{}"}),
            r"looked for [^()]*over: 2 files .*\(\.json 1, \.txt 1\)$",
        ),
    ],
)
def test_an_archive_without_images_is_an_error_in_one_line(
    folder: Path, data: bytes, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_all(data)
    assert "\n" not in str(caught.value)


def test_a_deleted_archive_is_a_broken_image(folder: Path) -> None:
    Path("a.tar").write_bytes(packed())
    names = list(sources.find(["a.tar"]))
    reader = sources.Reader()
    Path("a.tar").unlink()
    with pytest.raises(BrokenImage, match="No such file"):
        reader.load(names[0])


def test_a_broken_archive_is_noted_once_and_the_others_read(folder: Path) -> None:
    Path("a.tar").write_bytes(packed()[:5000])
    Path("b.tar").write_bytes(packed())
    notes: list[str] = []
    names = list(sources.find(["a.tar", "b.tar", "a.tar"], note=notes.append))
    assert names == [
        *("a.tar::0.jpg", "a.tar::1.jpg"),
        *(f"b.tar::{name}" for name in MEMBERS),
        *("a.tar::0.jpg", "a.tar::1.jpg"),
    ]
    assert len(notes) == 1


def with_size(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Two members, the first with `size` in its header."""
    data = bytearray(packed({"0.jpg": b"0", "1.jpg": b"1"}))
    data[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    data[156:157] = kind
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize("size", [-1, -512, -513, -1536, -(2**40), 2**40, 2**62])
def test_an_impossible_size_is_an_error(folder: Path, size: int) -> None:
    Path("a.tar").write_bytes(with_size(size))
    bad = []
    with contextlib.suppress(DataError):
        for member in tar.members("a.tar"):
            try:
                assert member.read() == b"1"
            except ImageError as error:
                bad.append(error.code)
    assert len(bad) <= 1


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_header_of_gigabytes_is_not_read_into_memory(folder: Path, compress: type[bytes]) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        Path("a.tar").write_bytes(compress(with_size(2**32, kind)))
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match="broken at its start"):
                list(tar.members("a.tar"))
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("seekable", [True, False])
def test_a_stream_reads_the_bytes_at_a_position(folder: Path, seekable: bool) -> None:
    data = random.Random(1).randbytes(200_000)
    source = PeekableStream(io.BytesIO(data), seekable_file=seekable)
    for place, size in ((0, 100), (100, 600), (900, 5), (150_000, 9), (199_990, 600), (300_000, 9)):
        assert source.seek(place) == (place if seekable else min(place, len(data)))
        assert source.peek() == data[place : place + 512]
        assert source.read(size) == data[place : place + size]
        source.peek()
    with pytest.raises(ValueError, match="out of range"):
        source.read(-1)


def test_random_corruption_raises_only_known_errors_and_ends(folder: Path) -> None:
    """Random bytes are changed in archives with headers of all kinds."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, name in enumerate(["a.jpg", "b" * 200 + ".jpg", "ü.jpg", "c.jpg"]):
            info = tarfile.TarInfo(name)
            info.size = 100
            if number == 3:
                info.pax_headers = {"GNU.sparse.map": "0,50,90,50", "GNU.sparse.size": "900"}
            archive.addfile(info, io.BytesIO(b"x" * 100))
    intact, rng = file.getvalue(), random.Random(5)
    for _ in range(300):
        data = bytearray(intact)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(intact) - 9000)] = rng.randrange(256)
        block = rng.randrange(8) * 512
        header = data[block : block + 512]
        header[148:156] = b" " * 8
        data[block + 148 : block + 156] = b"%06o\0 " % sum(
            header
        )  # a valid checksum, so that the header is parsed
        Path("a.tar").write_bytes(data)
        members = 0
        try:
            for member in tar.members("a.tar"):
                members += 1
                try:
                    member.read()
                except ImageError:
                    continue
        except DataError:
            pass
        assert members <= 20
