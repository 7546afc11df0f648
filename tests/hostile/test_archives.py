"""Tar archives that claim much for few bytes: headers, names, holes, zeros, digits.

Each is read in a process with a limit of memory. It is given as the input of a job, and each member
is loaded by its name, too.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.errors import BrokenImage, TooLarge
from serving.inputs import sources
from serving.inputs.compression import PeekableStream, open_tar
from tests.support import zip_files

ROOT = Path(__file__).parents[2]
MEGABYTE = 10**6

READ = """
import json, resource, sys, time
from serving.inputs import sources
from serving.errors import FledgeError
before = resource.getrusage(resource.RUSAGE_SELF)
limit = 1_500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
notes, found = [], []
try:
    found = list(sources.find([sys.argv[1]], note=notes.append))
except FledgeError as error:
    notes.append(str(error))
reader = sources.Reader()
sizes, errors = [], []
for name in found:
    try:
        sizes.append(len(reader.load(name)))
    except FledgeError as error:
        errors.append(f"{error.code}: {error}")
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "names": len(found), "sizes": sizes, "errors": errors, "notes": notes,
    "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    "megabytes": (after.ru_maxrss - before.ru_maxrss) / 1000,
}))
"""


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    return b"%d" % (len(rest) + len(str(len(rest) + len(str(len(rest)))))) + rest


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def header(kind: bytes, body: bytes, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.GNU_FORMAT) + block(body)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    return header(kind, b"".join(record(*one) for one in records))


def member(data: bytes = b"abc", name: str = "1.jpg") -> bytes:
    return header(b"0", data, name)


def long_name(size: int) -> bytes:
    return header(b"L", b"a" * size + b".jpg", "././@LongLink") + member()


def sparse(size: int, stored: bytes = b"", version: str = "1.0") -> bytes:
    """A sparse member of `size` bytes that begins with the bytes `stored`."""
    blocks = [(0, len(stored)), (size, 0)]
    if version == "old":
        info = tarfile.TarInfo("1.jpg")
        info.type, info.size = b"S", len(stored)
        data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        for number, (offset, length) in enumerate(blocks):
            at = 386 + 24 * number
            data[at : at + 24] = b"%011o\0%011o\0" % (offset, length)
        data[483:495] = b"%011o\0" % size
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data)
        return bytes(data) + block(stored)
    numbers = [b"%d" % number for pair in blocks for number in pair]
    if version == "1.0":
        head = pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
                   (b"GNU.sparse.name", b"1.jpg"),
                   (b"GNU.sparse.realsize", b"%d" % size))  # fmt: skip
        lines = b"\n".join([b"%d" % len(blocks), *numbers, b""])
        return head + member(block(lines) + stored)
    if version == "0.1":
        head = pax((b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.map", b",".join(numbers)))
    else:
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        records = [
            (b"GNU.sparse." + key, value)
            for pair in pairs
            for key, value in zip((b"offset", b"numbytes"), pair, strict=True)
        ]
        head = pax((b"GNU.sparse.size", b"%d" % size), *records)
    return head + member(stored)


def read(path: Path, data: bytes) -> dict:
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PACKED = {
    "gz": lambda data: gzip.compress(data, 9 if len(data) < MEGABYTE else 1),
    "xz": lambda data: lzma.compress(data, preset=0),
}

CHEAP: dict[str, Callable[[], bytes]] = {
    "digits": lambda: header(b"x", b"9" * 1_000_000) + member(),
    "digits of a global header": lambda: header(b"g", b"9" * 1_000_000) + member(),
    "digits of a comment": lambda: pax((b"comment", b"9" * 1_000_000)) + member(),
    "digits of a path": lambda: pax((b"path", b"9" * 1_000_000)) + member(),
    "digits of a size": lambda: pax((b"size", b"9" * 1_000_000)) + member(),
    "records without a length": lambda: header(b"x", b"\n" + b"a=\n" * 100_000 + b"\n") + member(),
    "record that ends before its start": lambda: header(b"x", b"9 a=1234\n1 a=\n0 =\n") + member(),
    "digits beside a map": lambda: (
        pax((b"GNU.sparse.size", b"9"), (b"path", b"9" * 900_000)) + member()
    ),
    "digits after a global map": lambda: (
        pax((b"GNU.sparse.size", b"9"), kind=b"g") + pax((b"path", b"9" * 900_000)) + member()
    ),
    "digits of an empty charset": lambda: (
        pax((b"hdrcharset", b""), (b"path", b"9" * 900_000)) + member()
    ),
    "name": lambda: long_name(60 * MEGABYTE),
    "link name": lambda: header(b"K", b"a" * 60 * MEGABYTE) + member(),
    "records": lambda: pax(*[(b"a%d" % n, b"") for n in range(300_000)]) + member(),
    "headers": lambda: header(b"x", record(b"path", b"a.jpg")) * 3000 + member(),
    "names": lambda: b"".join(long_name(1_000_000) for _ in range(60)),
    "holes": lambda: sparse(390 * MEGABYTE) * 200,
    "holes of the old format": lambda: sparse(390 * MEGABYTE, version="old") * 200,
    "zeros": lambda: member(bytes(120 * MEGABYTE)),
    "zeros of another file": lambda: member(bytes(60 * MEGABYTE), "a.bin") * 2 + member(),
    "blocks of a map": lambda: (
        pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"0,0," * 240_000 + b"0,3")) + member()
    ),
    "blocks in the data": lambda: (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + member(b"9" * 400 + b"\n"
        + b"1\n" * 1_000_000)
    ),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "packed"),
    [*((kind, "gz") for kind in CHEAP), *((kind, "xz") for kind in ("name", "zeros", "names"))],
)
def test_few_bytes_cost_little(tmp_path: Path, kind: str, packed: str) -> None:
    data = PACKED[packed](CHEAP[kind]() + bytes(1024))
    found = read(tmp_path / "a.tar.gz", data)
    assert found["seconds"] < 2
    assert found["megabytes"] < 200
    told = [*found["notes"], *found["errors"], *found["sizes"]]
    assert told or found["names"]


def zipped(*, size: int, count: int = 1, name: bytes = b"1.jpg") -> bytes:
    """A zip of one packed member with zeros, which its directory names `count` times."""
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(bytes(size)) + packer.flush()
    head = zip_files.local(name, packed, method=8, size=size)
    directory = zip_files.entry(name, packed, method=8, size=size) * count
    end64 = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), len(head)
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(head) + len(directory), 1)
    return head + directory + end64 + locator + zip_files.end_record(0xFFFF, 2**32 - 1, 2**32 - 1)


ZIPS: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: zipped(size=390 * MEGABYTE),
    "one kernel for all members": lambda: zipped(size=5 * MEGABYTE, count=2000),
    "one kernel for files without a suffix": lambda: zipped(
        size=5 * MEGABYTE, count=2000, name=b"README"
    ),
    "many members": lambda: zipped(size=0, count=200_000, name=b"a.txt"),
    "a directory that is not there": lambda: zip_files.end_record(60_000, 2**31, 0),
    "more members than are allowed": lambda: zipped(size=0)[:-98] + struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *(2**40,) * 2, 2**46, 0
    ) + zipped(size=0)[-42:],
    "ends without number": lambda: b"PK\5\6" * 100_000,
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("kind", ZIPS)
def test_few_bytes_of_a_zip_cost_little(tmp_path: Path, kind: str) -> None:
    found = read(tmp_path / "a.zip", ZIPS[kind]())
    assert found["seconds"] < (8 if kind == "many members" else 3)
    assert found["megabytes"] < 120
    assert sum(found["sizes"]) < 100 * MEGABYTE
    assert found["notes"] or found["errors"] or found["names"]


@pytest.mark.parametrize("kind", ["digits", "digits of a path", "holes", "headers"])
def test_few_bytes_of_a_plain_archive_cost_little(tmp_path: Path, kind: str) -> None:
    found = read(tmp_path / "a.tar", CHEAP[kind]() + bytes(1024))
    assert found["seconds"] < 1
    assert found["megabytes"] < 20
    assert found["notes"] or found["errors"]


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0", "old"])
def test_sparse_members_have_their_bytes_and_a_limit(tmp_path: Path, version: str) -> None:
    stored = random.Random(1).randbytes(5000)
    path = tmp_path / "a.tar"
    path.write_bytes(sparse(1_000_000, stored, version) + bytes(1024))
    reader = sources.Reader()
    (name,) = sources.find([str(path)])
    assert reader.load(name) == stored.ljust(1_000_000, b"\0")
    reader.close()
    path.write_bytes(sparse(390 * MEGABYTE, stored, version) + bytes(1024))
    (name,) = sources.find([str(path)])
    with pytest.raises(TooLarge, match="more than 250 times as many"):
        sources.Reader().load(name)


@pytest.mark.parametrize("pairs", [b"5,3,0,3", b"0,5,3,2", b"0,3,9,-3", b"0,30", b"-3,3"])
def test_a_sparse_map_out_of_order_is_broken(tmp_path: Path, pairs: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(
        pax((b"GNU.sparse.size", b"20"), (b"GNU.sparse.map", pairs)) + member() + bytes(1024)
    )
    with pytest.raises(BrokenImage, match=r"a sparse file whose blocks|can't be read"):
        sources.Reader().load(f"{path}::1.jpg")


def test_a_name_up_to_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for data in (long_name(4000), pax((b"path", b"9" * 4000 + b".jpg")) + member()):
        path.write_bytes(data + bytes(1024))
        (name,) = sources.find([str(path)])
        reader = sources.Reader()
        assert reader.load(name) == b"abc"
        reader.close()


def test_records_that_are_not_used_do_not_matter(tmp_path: Path) -> None:
    """Extended attributes may be of any bytes; the character set counts for the names."""
    path = tmp_path / "a.tar"
    path.write_bytes(
        pax((b"SCHILY.xattr.user.x", bytes(range(256)) * 9), (b"comment", b"1=2"),
            (b"hdrcharset", b"BINARY"), (b"path", b"\xfc.jpg"), (b"mtime", b"1.5")) + member()
        + pax((b"hdrcharset", b"BINARY"), kind=b"g") + pax((b"path", b"\xfd.jpg")) + member()
        + pax((b"path", "ü.jpg".encode()), (b"hdrcharset", b"ISO-IR 10646 2000 UTF-8")) + member()
        + bytes(1024)
    )  # fmt: skip
    names = [name.partition("::")[2] for name in sources.find([str(path)])]
    assert names == ["\udcfc.jpg", "\udcfd.jpg", "ü.jpg"]
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as file:
        assert names == file.getnames()


def test_a_large_archive_that_is_worth_its_bytes_is_read(tmp_path: Path) -> None:
    """Of photos, which don't shrink, and of uncompressed pictures that are mostly of one colour."""
    rng = random.Random(1)
    members = {f"{number}.jpg": rng.randbytes(200_000) for number in range(20)}
    members |= {f"{n}.bmp": b"BM" + rng.randbytes(40_000) + bytes(4_000_000) for n in range(8)}
    path = tmp_path / "a.tar.gz"
    path.write_bytes(
        gzip.compress(b"".join(member(data, name) for name, data in members.items()), 1)
    )
    reader = sources.Reader()
    notes: list[str] = []
    names = list(sources.find([str(path)], note=notes.append))
    found = {name.partition("::")[2]: reader.load(name) for name in names}
    assert found == members
    reader.close()


def xz(data: bytes, dictionary: int) -> bytes:
    """An .xz file whose header states a dictionary: 30 is 128 MiB, 32 256 MiB, 39 3 GiB."""
    packed = lzma.compress(data)
    head = b"\x02\0\x21\x01%c\0\0\0" % dictionary
    return packed[:12] + head + zlib.crc32(head).to_bytes(4, "little") + packed[24:]


@pytest.mark.parametrize("dictionary", [32, 39, 40])
def test_an_xz_file_may_not_ask_for_gigabytes(tmp_path: Path, dictionary: int) -> None:
    """A process without a limit of memory would take the 3 GiB."""
    path = tmp_path / "a.tar.xz"
    found = read(path, xz(member() + bytes(1024), dictionary))
    assert found["names"] == 0
    note = found["notes"][0]
    assert note.startswith(f"{path}: can't be read at its start: unpacking it needs more than 256")
    assert "\n" not in note
    with pytest.raises(BrokenImage, match="more than 256 MB"):
        sources.Reader().load(f"{path}::1.jpg")


def test_a_later_stream_of_xz_may_not_ask_for_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.xz"
    rest = member(bytes(range(256)) * 100, "2.jpg") + member(b"d", "3.jpg") + bytes(1024)
    path.write_bytes(xz(member() + rest[:5000], 30) + xz(rest[5000:], 39))
    notes: list[str] = []
    names = list(sources.find([str(path)], note=notes.append))
    assert names == [f"{path}::1.jpg", f"{path}::2.jpg"]
    assert "more than 256 MB" in notes[0]
    reader = sources.Reader()
    assert reader.load(names[0]) == b"abc"
    with pytest.raises(BrokenImage, match="more than 256 MB"):
        reader.load(names[1])
    reader.close()


@pytest.mark.parametrize("end", [2**16 + more for more in (-8, -4, 0, 4, 8)])
def test_several_streams_of_xz_are_read(tmp_path: Path, end: int) -> None:
    """Several streams, the first of which ends at `end`, with other bytes behind the last."""
    rng = random.Random(end)
    data = member(rng.randbytes(300_000)) + bytes(1024)
    packed = (lzma.compress(data[:size], preset=0) for size in range(end - 200, end))
    first = next(one for one in packed if len(one) == end)
    streams = first + lzma.compress(data[len(lzma.decompress(first)) :], preset=0)
    path = tmp_path / "a.tar.xz"
    for tail in (b"", bytes(4), rng.randbytes(100), bytes(2**17), b"\xfd7zX"):
        path.write_bytes(streams + tail)
        with open_tar(str(path)) as stream:
            assert read_all(stream) == data
    path.write_bytes(streams[:-50_000])
    with open_tar(str(path)) as stream, pytest.raises(EOFError):
        read_all(stream)


def read_all(stream: PeekableStream) -> bytes:
    return b"".join(iter(lambda: stream.read(10_000), b""))


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    """`open` of a FIFO waits for a writer."""
    path = tmp_path / "a.tar"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"), open_tar(str(path)):
        pass
