"""Laws of broken archives: what is good in them is scored, and the rest is said."""

import contextlib
import gzip
import io
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from serving.errors import BrokenImage, DataError, ImageError
from serving.inputs import sources
from serving.inputs import tar as archives
from serving.inputs.compression import PeekableStream

MEMBERS = {f"{number}.jpg": bytes([number]) * 3000 for number in range(10)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(members: dict[str, bytes] = MEMBERS) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


SPAN = 512 + 3072  # a header and its data
END = len(MEMBERS) * SPAN


def look(data: bytes, name: str = "a.tar") -> tuple[dict[str, bytes | str], list[str]]:
    """What is found, each with its bytes or the code of its error; what is said."""
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


def test_a_whole_archive_is_nothing_to_speak_of(home: Path) -> None:
    assert look(packed()) == (MEMBERS, [])
    assert look(gzip.compress(packed())) == (MEMBERS, [])


@pytest.mark.parametrize("squeeze", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("size", "whole", "torn"),
    [
        (END, 10, 0),
        (END + 100, 10, 0),
        (END - 50, 10, 0),  # the padding alone is gone
        (END - 1000, 9, 1),
        (END - 3072, 9, 1),
        (END - SPAN + 100, 9, 0),
        (END - SPAN, 9, 0),
        (3 * SPAN + 700, 3, 1),
    ],
)
def test_an_archive_that_is_cut_off_is_good_so_far(
    home: Path, squeeze: type[bytes], size: int, whole: int, torn: int
) -> None:
    answers, notes = look(squeeze(packed()[:size]))
    expected: dict[str, bytes | str] = dict(list(MEMBERS.items())[:whole])
    expected |= {f"{whole}.jpg": "broken-image"} if torn else {}
    assert answers == expected
    assert len(notes) == 1
    assert notes[0].startswith(("a.tar: cut off", f"a.tar: broken after {whole - 1}.jpg"))


def test_a_torn_stream_is_good_so_far(home: Path) -> None:
    members = {f"{n}.jpg": random.Random(n).randbytes(3000) for n in range(10)}
    data = gzip.compress(packed(members))
    answers, notes = look(data[: len(data) // 2], "a.tar.gz")
    good = [name for name, answer in answers.items() if answer == members[name]]
    assert good == list(members)[: len(good)]
    assert 3 <= len(good) <= 5
    assert all(answer == "broken-image" for answer in list(answers.values())[len(good) :])
    assert len(notes) == 1
    assert notes[0].startswith("a.tar.gz: broken after ")
    assert "what follows is left out" in notes[0]


@pytest.mark.parametrize("squeeze", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_broken_header_ends_an_archive(home: Path, squeeze: type[bytes]) -> None:
    data = bytearray(packed())
    data[4 * SPAN + 150] ^= 1
    answers, notes = look(squeeze(bytes(data)))
    assert answers == dict(list(MEMBERS.items())[:4])
    assert notes == ["a.tar: broken after 3.jpg; what follows is left out (bad checksum)"]
    reader = sources.Reader()
    for _ in range(2):  # whoever asks, and how often: the answer is the same
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
        (packed({"a.txt": b"a", "b.json": b"{}"}), r"no images in it; looked for [^()]*$"),
    ],
)
def test_an_archive_without_images_is_an_error_in_one_line(
    home: Path, data: bytes, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        look(data)
    assert "\n" not in str(caught.value)


def test_an_archive_that_vanishes_is_a_broken_image(home: Path) -> None:
    Path("a.tar").write_bytes(packed())
    names = list(sources.find(["a.tar"]))
    reader = sources.Reader()
    Path("a.tar").unlink()
    with pytest.raises(BrokenImage, match="No such file"):
        reader.load(names[0])


def test_the_rest_is_scored_and_said_once(home: Path) -> None:
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
    """Two members, the first with such a size in its header."""
    data = bytearray(packed({"0.jpg": b"0", "1.jpg": b"1"}))
    data[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    data[156:157] = kind
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize("size", [-1, -512, -513, -1536, -(2**40), 2**40, 2**62])
def test_a_size_that_can_not_be_is_broken(home: Path, size: int) -> None:
    Path("a.tar").write_bytes(with_size(size))
    bad = []
    with contextlib.suppress(DataError):
        for member in archives.members("a.tar"):
            try:
                assert member.read() == b"1"
            except ImageError as error:
                bad.append(error.code)
    assert len(bad) <= 1


@pytest.mark.parametrize("squeeze", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_header_that_wants_gigabytes_gets_none(home: Path, squeeze: type[bytes]) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        Path("a.tar").write_bytes(squeeze(with_size(2**32, kind)))
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match="broken at its start"):
                list(archives.members("a.tar"))
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("jumps", [True, False])
def test_a_source_reads_what_is_there(home: Path, jumps: bool) -> None:
    data = random.Random(1).randbytes(200_000)
    source = PeekableStream(io.BytesIO(data), jumps=jumps)
    for place, size in ((0, 100), (100, 600), (900, 5), (150_000, 9), (199_990, 600), (300_000, 9)):
        assert source.seek(place) == (place if jumps else min(place, len(data)))
        assert source.peek() == data[place : place + 512]
        assert source.read(size) == data[place : place + size]
        source.peek()
    with pytest.raises(ValueError, match="out of range"):
        source.read(-1)


def test_no_corruption_gets_out_or_goes_on_for_ever(home: Path) -> None:
    """Headers of all kinds, hurt in many places."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(["a.jpg", "b" * 200 + ".jpg", "ü.jpg", "c.jpg"]):
            info = tarfile.TarInfo(name)
            info.size = 100
            if number == 3:
                info.pax_headers = {"GNU.sparse.map": "0,50,90,50", "GNU.sparse.size": "900"}
            tar.addfile(info, io.BytesIO(b"x" * 100))
    good, dice = file.getvalue(), random.Random(5)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(good) - 9000)] = dice.randrange(256)
        block = dice.randrange(8) * 512
        header = data[block : block + 512]
        header[148:156] = b" " * 8
        data[block + 148 : block + 156] = b"%06o\0 " % sum(header)  # that it is looked at
        Path("a.tar").write_bytes(data)
        members = 0
        try:
            for member in archives.members("a.tar"):
                members += 1
                try:
                    member.read()
                except ImageError:
                    continue
        except DataError:
            pass
        assert members <= 20
