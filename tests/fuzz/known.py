"""Faults that are known and belong to later work. This is the only place where they are excused.

The fuzzer leaves out inputs that show one of them: they would be found again and again, each time
for seconds. `--replay` still shows the fault. `test_known.py` fails as soon as an example does no
longer show its fault: then remove the entry.
"""

from __future__ import annotations

import gzip
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DECODED_PIXELS = 4_000_000
"""`max_pixels` of the targets that decode. With the default of 100 million, pictures of a few bytes
take more than 300 MB and 1 s: use `serving.imaging.decode.MAX_PIXELS` once decoding is limited by
its cost."""

BATCH_PIXELS = 100_000
"""`max_pixels` of the target that sends whole requests: 64 pictures of one body have no limit of
cost together, so that a body of 64 KB takes many seconds. Use `DECODED_PIXELS` once they have."""

_UNPACKED = 2**24  # bytes of a compressed archive that are searched


@dataclass(frozen=True)
class Known:
    """A known fault.

    Attributes:
        targets: Names of the targets that can show it.
        reason: What happens, and where.
        shows: Whether an input shows it.
        example: Builds an input for the first target.
    """

    targets: tuple[str, ...]
    reason: str
    shows: Callable[[bytes], bool]
    example: Callable[[], bytes]


def skipped(target: str, data: bytes) -> bool:
    """Return whether an input is left out, because it shows a known fault."""
    return any(target in known.targets and known.shows(data) for known in KNOWN)


# Colour profiles with multi-process elements: any number of them may share one matrix or table.

_ELEMENTS = 16


def _profiles(data: bytes) -> Iterator[bytes]:
    """Yield the input, which has the profile of most formats, and the profiles packed in a PNG."""
    yield data
    for found in re.finditer(rb"iCCP[^\0]{1,79}\0\0", data):
        unpacker = zlib.decompressobj()
        try:
            yield unpacker.decompress(data[found.end() :], 2**20)
        except zlib.error:
            continue


def _shared_elements(data: bytes) -> bool:
    for profile in _profiles(data):
        for found in re.finditer(rb"mpet", profile):
            count = profile[found.end() + 8 : found.end() + 12]
            if int.from_bytes(count, "big") > _ELEMENTS:
                return True
    return False


def _profile() -> bytes:
    """A profile of 3,000 elements at the place of one 3 x 3 matrix."""
    count = 3000
    matrix = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    head = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, count)
    tag = head + struct.pack(">II", len(head) + 8 * count, len(matrix)) * count + matrix
    table = struct.pack(">I4sII", 1, b"D2B0", 144, len(tag))
    start = struct.pack(">I4sI", 144 + len(tag), b"lcms", 0x04300000) + b"scnrRGB XYZ " + bytes(12)
    start += b"acsp" + b"APPL" + bytes(24) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return start.ljust(128, b"\0") + table + tag


# Tar headers

_SIZE = 2**20
_SPARSE = re.compile(rb"GNU\.sparse\.(?:real)?size=([0-9]{1,20})")


def _unpacked(data: bytes) -> bytes:
    if data.startswith(b"\x1f\x8b"):
        unpacker = zlib.decompressobj(31)
        try:
            return unpacker.decompress(data, _UNPACKED)
        except zlib.error:
            return b""
    from tests.fuzz.targets.archives import unpack

    return unpack(data, _UNPACKED)


def _digits(data: bytes) -> bool:
    return re.search(rb"[0-9]{8000}", _unpacked(data)) is not None


def _pax_digits() -> bytes:
    body = b"9" * 30_000
    info = tarfile.TarInfo("PaxHeaders/x")
    info.type, info.size = b"x", len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def _large_header(data: bytes) -> bool:
    """Return whether a header states a large size or a long name, or the content is large."""
    plain = _unpacked(data)
    if len(plain) >= _UNPACKED:
        return True
    if any(int(size) > _SIZE for size in _SPARSE.findall(plain)):
        return True
    for at in range(0, len(plain) - 511, 512):
        block = plain[at : at + 512]
        if block[257:262] == b"ustar" and block[156:157] in b"LKxgXS":
            fields = (block[124:136], block[483:495])
            if any(_number(one) > _SIZE for one in fields[: 1 + (block[156:157] == b"S")]):
                return True
    return False


def _number(field: bytes) -> int:
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else 0


def _long_name() -> bytes:
    name = b"a" * (60 * 10**6) + b".jpg"
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", len(name)
    whole = info.tobuf(tarfile.GNU_FORMAT) + name + bytes(-len(name) % 512)
    return gzip.compress(whole + tarfile.TarInfo("1.jpg").tobuf() + bytes(1024), mtime=0)


KNOWN = (
    Known(
        ("profile", "decode", "request"),
        "the colour engine takes seconds and gigabytes for elements that share their data",
        _shared_elements,
        _profile,
    ),
    Known(
        ("tar", "compressed"),
        "Python's reader of pax headers takes quadratic time for a run of digits",
        _digits,
        _pax_digits,
    ),
    Known(
        ("compressed", "tar"),
        "names of megabytes, sparse files and packed zeros are read into memory",
        _large_header,
        _long_name,
    ),
)
