"""Random mutations of image files, as by corruption in storage or transfer, or by an attacker."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.robustness import corpus
from tests.robustness.file_builders import PNG_MAGIC, chunk, riff, segment

EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 257, 32_767, 32_768, 65_535, 65_536)
EDGES += (2**24, 2**31 - 1, 2**31, 2**32 - 1)
MAGIC = {
    "jpeg": b"\xff\xd8\xff",
    "png": PNG_MAGIC,
    "webp": b"RIFF",
    "gif": b"GIF",
    "tiff": (b"II", b"MM"),
    "bmp": b"BM",
}
Parts = list[tuple[bytes, bytes]]


def seeds() -> dict[str, list[bytes]]:
    """Small files of the corpus by format."""
    chunks: dict[str, list[bytes]] = {kind: [] for kind in MAGIC}
    for item in corpus.items():
        for kind, magic in MAGIC.items():
            if item.data.startswith(magic) and len(item.data) < 20_000:
                # Valid files weigh more: mutants of broken files mostly fail in the same place.
                chunks[kind] += [item.data] * (4 if item.code is None else 1)
    return chunks


class Mutator:
    """Makes mutants of the corpus; the same random numbers give the same mutants."""

    def __init__(self) -> None:
        self._seeds = seeds()

    def image(self, rng: random.Random) -> bytes:
        kind = rng.choice(list(self._seeds))
        data = rng.choice(self._seeds[kind])
        for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
            change = rng.choice(_CHANGES)
            other_kind = kind if rng.random() < 0.8 else rng.choice(list(self._seeds))
            data = change(rng, data, rng.choice(self._seeds[other_kind]))
        return data


def bits(rng: random.Random, data: bytes, other: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if damaged:
            damaged[_position(rng, damaged)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def octets(rng: random.Random, data: bytes, other: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if damaged:
            damaged[_position(rng, damaged)] = rng.choice(
                (0, 1, 127, 128, 254, 255, rng.randrange(256))
            )
    return bytes(damaged)


def words(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Overwrite 2, 4 or 8 bytes, which may be a length, an offset or a size."""
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    at = min(_position(rng, data), len(data) - size)
    value = rng.choice(EDGES) % 2 ** (8 * size)
    if rng.random() < 0.3:
        (old,) = struct.unpack_from(form, data, at)
        value = (old + rng.choice((-1, 1, 2, 256))) % 2 ** (8 * size)
    return data[:at] + struct.pack(form, value) + data[at + size :]


def cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randint(0, len(data))]


def grow(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def repeat(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def drop(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def swap(rng: random.Random, data: bytes, other: bytes) -> bytes:
    a, b, c, d = sorted(rng.randint(0, len(data)) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def parts(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Change whole chunks or segments, with correct lengths and checksums."""
    for magic, split, join in _STRUCTURES:
        if data.startswith(magic):
            own, others = split(data), split(other) if other.startswith(magic) else []
            return join(_rearrange(rng, own, others))
    return words(rng, data, other)


def _rearrange(rng: random.Random, own: Parts, others: Parts) -> Parts:
    if not own:
        return own
    at, to = rng.randrange(len(own)), rng.randrange(len(own))
    kind, body = own[at]
    choice = rng.randrange(6)
    if choice == 0:
        return own[:at] + own[at + 1 :]
    if choice == 1:
        return own[:to] + [own[at]] * rng.choice((1, 2, 200)) + own[to:]
    if choice == 2:
        own[at], own[to] = own[to], own[at]
        return own
    if choice == 3 and others:
        return [*own[:to], rng.choice(others), *own[to:]]
    if choice == 4:
        return [*own[:at], (rng.choice(own + others)[0], body), *own[at + 1 :]]
    change = rng.choice((bits, octets, words, cut, grow, repeat))
    return [*own[:at], (kind, change(rng, body, b"")), *own[at + 1 :]]


def _split_png(data: bytes) -> Parts:
    chunks, at = [], len(PNG_MAGIC)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _join_png(chunks: Parts) -> bytes:
    return PNG_MAGIC + b"".join(chunk(kind, body) for kind, body in chunks)


def _split_jpeg(data: bytes) -> Parts:
    """Segments; everything from the first scan on is a last entry without a marker."""
    chunks, at = [], 2
    while at + 4 <= len(data) and data[at] == 255 and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        chunks.append((data[at + 1 : at + 2], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return [*chunks, (b"", data[at:])]


def _join_jpeg(chunks: Parts) -> bytes:
    segments = [segment(kind[0], body[:65_533]) if kind else body for kind, body in chunks]
    return b"\xff\xd8" + b"".join(segments)


def _split_riff(data: bytes) -> Parts:
    chunks, at = [], 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return chunks


_STRUCTURES: tuple[tuple[bytes, Callable[[bytes], Parts], Callable[[Parts], bytes]], ...] = (
    (PNG_MAGIC, _split_png, _join_png),
    (b"\xff\xd8\xff", _split_jpeg, _join_jpeg),
    (b"RIFF", _split_riff, lambda chunks: riff(*chunks)),
)
_CHANGES = (bits, octets, words, words, cut, grow, repeat, drop, swap, splice, *[parts] * 5)


def _position(rng: random.Random, data: bytes | bytearray) -> int:
    """A random position, mostly in the header."""
    return rng.randrange(min(len(data), rng.choice((40, 200, len(data)))))


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((1, 4, 16, 100, 1000)))
