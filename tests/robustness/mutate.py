"""Mutations: what a bad disk, a bad line or a bad person makes of a file."""

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
    """Small files of the corpus, good and bad, by format."""
    found: dict[str, list[bytes]] = {kind: [] for kind in MAGIC}
    for item in corpus.items():
        for kind, magic in MAGIC.items():
            if item.data.startswith(magic) and len(item.data) < 20_000:
                # Of good ones more: mutants of broken ones mostly break where those do.
                found[kind] += [item.data] * (4 if item.code is None else 1)
    return found


class Mutator:
    """Makes the same mutants of the same seeds from the same random numbers."""

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
    hurt = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if hurt:
            hurt[_place(rng, hurt)] ^= 1 << rng.randrange(8)
    return bytes(hurt)


def octets(rng: random.Random, data: bytes, other: bytes) -> bytes:
    hurt = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if hurt:
            hurt[_place(rng, hurt)] = rng.choice((0, 1, 127, 128, 254, 255, rng.randrange(256)))
    return bytes(hurt)


def words(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A length, an offset or a size becomes another, perhaps."""
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    at = min(_place(rng, data), len(data) - size)
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
    """Change whole chunks or segments, and put their lengths and sums right."""
    for magic, apart, together in _STRUCTURES:
        if data.startswith(magic):
            mine, theirs = apart(data), apart(other) if other.startswith(magic) else []
            return together(_rearranged(rng, mine, theirs))
    return words(rng, data, other)


def _rearranged(rng: random.Random, mine: Parts, theirs: Parts) -> Parts:
    if not mine:
        return mine
    at, to = rng.randrange(len(mine)), rng.randrange(len(mine))
    kind, body = mine[at]
    choice = rng.randrange(6)
    if choice == 0:
        return mine[:at] + mine[at + 1 :]
    if choice == 1:
        return mine[:to] + [mine[at]] * rng.choice((1, 2, 200)) + mine[to:]
    if choice == 2:
        mine[at], mine[to] = mine[to], mine[at]
        return mine
    if choice == 3 and theirs:
        return [*mine[:to], rng.choice(theirs), *mine[to:]]
    if choice == 4:
        return [*mine[:at], (rng.choice(mine + theirs)[0], body), *mine[at + 1 :]]
    change = rng.choice((bits, octets, words, cut, grow, repeat))
    return [*mine[:at], (kind, change(rng, body, b"")), *mine[at + 1 :]]


def _png_apart(data: bytes) -> Parts:
    found, at = [], len(PNG_MAGIC)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _png_together(found: Parts) -> bytes:
    return PNG_MAGIC + b"".join(chunk(kind, body) for kind, body in found)


def _jpeg_apart(data: bytes) -> Parts:
    """Segments, and all from the first scan on as a last one of its own kind."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 255 and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1 : at + 2], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return [*found, (b"", data[at:])]


def _jpeg_together(found: Parts) -> bytes:
    made = [segment(kind[0], body[:65_533]) if kind else body for kind, body in found]
    return b"\xff\xd8" + b"".join(made)


def _riff_apart(data: bytes) -> Parts:
    found, at = [], 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        found.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return found


_STRUCTURES: tuple[tuple[bytes, Callable[[bytes], Parts], Callable[[Parts], bytes]], ...] = (
    (PNG_MAGIC, _png_apart, _png_together),
    (b"\xff\xd8\xff", _jpeg_apart, _jpeg_together),
    (b"RIFF", _riff_apart, lambda found: riff(*found)),
)
_CHANGES = (bits, octets, words, words, cut, grow, repeat, drop, swap, splice, *[parts] * 5)


def _place(rng: random.Random, data: bytes | bytearray) -> int:
    """Mostly in the head, where what the rest means is said."""
    return rng.randrange(min(len(data), rng.choice((40, 200, len(data)))))


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((1, 4, 16, 100, 1000)))
