"""Faults that are known and belong to later work. This is the only place where they are excused.

The fuzzer leaves out inputs that show one of them: they would be found again and again, each time
for seconds. `--replay` still shows the fault. `test_known.py` fails as soon as an example does no
longer show its fault: then remove the entry.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

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


# Checkpoints: the network is built as described, before it is compared with the weights.

_WIDTHS = re.compile(rb'"(?:hidden|width_mult|width_per_group|growth_rate|init_channels)"')


def _stated_width(data: bytes) -> bool:
    return _WIDTHS.search(data) is not None


def _wide_head() -> bytes:
    from tests.fuzz.targets.runs import wide_checkpoint

    return wide_checkpoint(200_000)


KNOWN = (
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
    Known(
        ("checkpoint",),
        "a description of a few bytes states layers of gigabytes, which are built",
        _stated_width,
        _wide_head,
    ),
)
