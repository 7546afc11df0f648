"""Tar archives, plain and compressed: listing, and loading of members."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from serving.errors import FledgeError
from serving.inputs import archives, sources
from serving.inputs.archive_members import Member
from tests.fuzz.target import Target, put

_MEMBERS = 8  # as many are loaded by name


def _archive(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT, **pax: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers=pax) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    # Without most of the zeros that fill the last record.
    return file.getvalue().rstrip(b"\0") + bytes(1024)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def seeds() -> Iterator[bytes]:
    images = {"cat/1.jpg": b"one", "cat/2.png": b"two" * 200, "a.txt": b"no image", "1.jpg": b""}
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        yield _padded(_archive(images, form))
        yield _padded(_archive({"x" * 150 + "/é.jpg": b"long", "1.jpg": b"x"}, form))
    yield _padded(_archive({"1.jpg": b"a", "é.jpg": b"b"}, tarfile.PAX_FORMAT, comment="all"))
    yield _padded(_archive({"1.jpg": b"a"}) + _archive({"1.jpg": b"b"}))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"S")):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, "1.jpg"
            archive.addfile(info)
    yield _padded(file.getvalue().rstrip(b"\0") + bytes(1024))
    yield sparse()
    yield old_sparse()


def sparse() -> bytes:
    """An archive in which a pax header describes a sparse file, in format 1.0."""
    body = _padded(b"1\n0\n3\n") + _padded(b"abc")
    pax = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "1.jpg",
        "GNU.sparse.realsize": "3",
    }
    info = tarfile.TarInfo("GNUSparseFile.0/1.jpg")
    info.size, info.pax_headers = len(body), pax
    return info.tobuf(tarfile.PAX_FORMAT) + body + bytes(1024)


def old_sparse() -> bytes:
    """An archive with a sparse file in GNU's old format: the map is in the header."""
    info = tarfile.TarInfo("1.jpg")
    info.type, info.size = b"S", 3
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[386:410] = b"%011o\0%011o\0" % (0, 3)
    head[483:495] = b"%011o\0" % 3
    return repair(bytes(head)) + _padded(b"abc") + bytes(1024)


def check(data: bytes, path: Path = Path("a.tar")) -> None:
    put(path, data)
    notes: list[str] = []
    names = list(archives.names(str(path), notes.append))
    for member in _members(path):
        for _ in range(2):
            try:
                if not isinstance(member.read(), bytes):
                    raise AssertionError(member.name)
            except FledgeError:
                pass
    reader = sources.Reader()
    # The last one first: a compressed archive is then read again from its start.
    for name in [*names[:_MEMBERS][::-1], *names[:_MEMBERS]]:
        with contextlib.suppress(FledgeError):
            reader.load(name)
    reader.close()


def _members(path: Path) -> Iterator[Member]:
    try:
        for _, member in zip(range(_MEMBERS), archives.members(str(path)), strict=False):
            yield member
    except (FledgeError, OSError):  # `members` documents both
        pass


def repair(data: bytes) -> bytes:
    """Correct the checksum of every block that looks like a header."""
    out = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            block = out[at : at + 512]
            block[148:156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(out)


_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "major": (329, 8),
    "prefix": (345, 155),
    "map": (386, 96),
    "extended": (482, 1),
    "realsize": (483, 12),
}
_TYPES = b"0\0" + b"1234567" + b"SLKDMNVXxgs" + b"\xff"
_NUMBERS = (
    *(b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"           8", b"0x10\0", b"8\0"),
    *(
        b"\x80" + bytes(10) + b"\x08",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"1_0\0",
        b"00000001000\0",
    ),
    *(b"\0", b"00000000001\0", b"37777777777\0", b"\x80\0\0\0\0\0\0\x01\0\0\0\0", b"+1\0", b" \0"),
)
_NAMES = (
    *(b"1.jpg", b"../../1.jpg", b"/etc/1.jpg", b"a::b.jpg", b"2::1.jpg", b".x.jpg", b"\xff.jpg"),
    *(b"", b"a/", b"\n.jpg", b"a" * 100, b"./1.jpg", b"1.jpg/", b"GNUSparseFile.0/1.jpg"),
)
_PAX = (
    *(b"size=", b"path=", b"GNU.sparse.major=", b"GNU.sparse.minor=", b"GNU.sparse.name="),
    *(b"GNU.sparse.realsize=", b"GNU.sparse.size=", b"GNU.sparse.map=", b"GNU.sparse.numblocks="),
    *(b"GNU.sparse.offset=", b"GNU.sparse.numbytes=", b"hdrcharset=", b"mtime=", b"linkpath="),
)
_VALUES = (
    *(
        b"0",
        b"1",
        b"-1",
        b"99999999999",
        b"1e9",
        b"nan",
        b"",
        b"x",
        b"0,3",
        b"0,3,5,-1",
        b"1,",
        b"BINARY",
    ),
    *(b"\xff", b"1.jpg", b"9" * 4000, b"0,1," * 500 + b"0,1", b" 1", b"1_0", b"0x1", b"inf"),
)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Change a field of a header, a pax header, or whole blocks."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)] or [bytes(512)]
    heads = [n for n, block in enumerate(blocks) if block[257:262] == b"ustar"] or [0]
    at = rng.choice(heads)
    choice = rng.randrange(8)
    if choice < 4:
        field = rng.choice(list(_FIELDS))
        start, length = _FIELDS[field]
        pool = _NUMBERS
        if field in ("name", "link", "prefix"):
            pool = _NAMES
        elif field in ("type", "extended"):
            pool = tuple(bytes([kind]) for kind in _TYPES)
        elif field == "map":
            pool = (b"".join(rng.choice(_NUMBERS).ljust(12, b"\0") for _ in range(8)),)
        new = rng.choice(pool)[:length].ljust(length, b"\0")
        blocks[at] = blocks[at][:start] + new + blocks[at][start + length :]
    elif choice == 4:
        blocks[at:at] = _pax_blocks(rng)
    elif choice == 5:
        to = rng.randrange(len(blocks))
        blocks[to:to] = [blocks[at]] * rng.choice((1, 1, 2, 60))
    elif choice == 6:
        del blocks[rng.randrange(len(blocks))]
    else:
        return data[: rng.randint(0, len(data))]
    return repair(b"".join(blocks))


def _pax_blocks(rng: random.Random) -> list[bytes]:
    """Return a pax header of some records, with right or wrong lengths."""
    records = []
    for _ in range(rng.choice((1, 2, 4))):
        body = b" " + rng.choice(_PAX) + rng.choice(_VALUES) + b"\n"
        length = len(body) + len(str(len(body)))
        length += len(str(length)) - len(str(len(body)))
        stated = (
            rng.choice((b"", b"0", b"-5", b"99999", b"7" * 200)) if rng.random() < 0.1 else None
        )
        records.append((b"%d" % length if stated is None else stated) + body)
    data = b"".join(records)
    info = tarfile.TarInfo("PaxHeaders/x")
    info.type, info.size = rng.choice((b"x", b"x", b"g", b"X")), len(data)
    whole = info.tobuf(tarfile.USTAR_FORMAT) + _padded(data)
    return [whole[at : at + 512] for at in range(0, len(whole), 512)]


# Compressed archives

_ZSTD = b"\x28\xb5\x2f\xfd"


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=3).compress(data)


_PACK = {
    b"\x1f\x8b": lambda data: gzip.compress(data, 6, mtime=0),
    b"BZh": lambda data: bz2.compress(data, 1),
    b"\xfd7zXZ\0": lambda data: lzma.compress(data, preset=0),
    _ZSTD: _zstd,
}
_MOST = 2**22  # bytes that a change unpacks


def unpack(data: bytes, most: int = _MOST) -> bytes:
    """Return at most `most` bytes of what a compressed archive holds; of another one, itself."""
    import zstandard

    try:
        if data.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(31).decompress(data, most)
        if data.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(data, most)
        if data.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor(memlimit=2**26).decompress(data, most)
        if data.startswith(_ZSTD):
            reader = zstandard.ZstdDecompressor(max_window_size=2**26).stream_reader(data)
            return reader.read(most)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError):
        return b""
    return data


def compressed_seeds() -> Iterator[bytes]:
    plain = list(seeds())
    for number, data in enumerate((plain[0], plain[3], plain[6], sparse(), old_sparse())):
        for pack in _PACK.values():
            yield pack(data)
        if not number:
            yield gzip.compress(data[:700], mtime=0) + gzip.compress(data[700:], mtime=0)


def mutate_compressed(rng: random.Random, data: bytes) -> bytes:
    """Change the archive inside, pack it in another way, or join packed pieces."""
    magic = next((one for one in _PACK if data.startswith(one)), None)
    plain = unpack(data)
    if magic is None or not plain:
        return data
    choice = rng.randrange(8)
    if choice == 0:
        return rng.choice(list(_PACK.values()))(plain)
    if choice == 1:
        cut = rng.randint(0, len(plain))
        return _PACK[magic](plain[:cut]) + rng.choice(list(_PACK.values()))(plain[cut:])
    if choice == 2:
        return _PACK[magic](plain + bytes(rng.choice((512, 10_240, 2**20))))
    if choice == 3:
        return data + rng.choice((b"\0" * 8, b"\xff", data))
    return _PACK[magic](mutate(rng, plain))


def repair_compressed(data: bytes) -> bytes:
    """Give a gzip file the checksum and the length of its content."""
    if not data.startswith(b"\x1f\x8b") or len(data) < 18:
        return data
    unpacker = zlib.decompressobj(31)
    try:
        plain = unpacker.decompress(data[:-8], _MOST)
    except zlib.error:
        return data
    if unpacker.eof or unpacker.unconsumed_tail:
        return data
    return data[:-8] + struct.pack("<II", zlib.crc32(plain), len(plain) % 2**32)


# Zip archives


def zip_seeds() -> Iterator[bytes]:
    images = {"cat/1.jpg": b"one", "cat/2.png": b"two" * 200, "a.txt": b"no image", "é.jpg": b""}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in images.items():
                archive.writestr(zipfile.ZipInfo(name), data, method)
            archive.comment = b"PK\5\6"
        yield file.getvalue()
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w") as archive,
        archive.open(zipfile.ZipInfo("1.jpg"), "w", force_zip64=True) as member,
    ):
        member.write(b"wide")
    yield b"before" + file.getvalue()


def check_zip(data: bytes) -> None:
    check(data, Path("a.zip"))


_RECORDS = {b"PK\1\2": 46, b"PK\3\4": 30, b"PK\5\6": 22, b"PK\6\6": 56, b"PK\6\7": 20}
_ZIP_NUMBERS = (0, 1, 8, 12, 0x800, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1000, 46, 2**20)


def mutate_zip(rng: random.Random, data: bytes) -> bytes:
    """Change a field of a record, repeat a record, or cut the archive."""
    found = [
        (at, size)
        for mark, size in _RECORDS.items()
        for at in range(len(data) - 3)
        if data[at : at + 4] == mark
    ]
    choice = rng.randrange(8)
    if choice == 0 or not found:
        return data[: rng.randint(0, len(data))]
    at, size = rng.choice(found)
    if choice == 1:
        return data[:at] + data[at : at + size] * rng.choice((2, 60)) + data[at + size :]
    out, width = bytearray(data), rng.choice((2, 4, 8))
    field = at + 2 * rng.randrange(2, size // 2)
    number = rng.choice(_ZIP_NUMBERS) % 2 ** (8 * width)
    out[field : field + width] = number.to_bytes(width, "little")
    return bytes(out[: len(data)])


_WORDS = (*(one.rstrip(b"=") for one in _PAX), b"ustar\0" + b"00", b"ustar  \0", *_NUMBERS)

TARGETS = (
    Target("zip", check_zip, zip_seeds, mutate_zip, words=tuple(_RECORDS)),
    Target("tar", check, seeds, mutate, repair, words=_WORDS),
    Target(
        "compressed",
        check,
        compressed_seeds,
        mutate_compressed,
        repair_compressed,
        prepare=lambda: __import__("zstandard") and None,
        words=tuple(_PACK),
    ),
)
