"""Orientation by EXIF and XMP: all eight values, invalid values, broken EXIF."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from tests.robustness.file_builders import chunk, into_jpeg, png, segment, tags, tiff
from tests.robustness.scene import SCENE, Item, Pixels, encode_best, good, scene

KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
ORIENTATION = "exif-orientation"


def stored_pixels(orientation: int) -> Pixels:
    """The pixels to store so that applying the EXIF tag gives the scene."""
    pixels = {
        2: SCENE[:, ::-1],
        3: SCENE[::-1, ::-1],
        4: SCENE[::-1],
        5: SCENE.transpose(1, 0, 2),
        6: np.rot90(SCENE, 1),
        7: SCENE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(SCENE, -1),
    }.get(orientation, SCENE)
    return np.ascontiguousarray(pixels)


def with_orientation(kind: str, orientation: int) -> bytes:
    image = Image.fromarray(stored_pixels(orientation))
    if kind == "TIFF":
        return encode_best(image, kind, tiffinfo={0x0112: orientation})
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode_best(image, kind, exif=exif)


def exif_directory(
    kind: int, count: int, value: bytes, order: str = "<", tag: int = 0x0112
) -> bytes:
    """An EXIF directory with one entry."""
    mark = {"<": b"II", ">": b"MM"}[order]
    entry = struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    return mark + struct.pack(order + "HIH", 42, 8, 1) + entry + bytes(4)


UNUSABLE_EXIF = {
    "ascii": exif_directory(2, 2, b"6"),
    "byte": exif_directory(1, 1, b"\6"),
    "no-value": exif_directory(3, 0, b""),
    "division-by-zero": exif_directory(5, 1, struct.pack("<I", 26)) + struct.pack("<II", 6, 0),
    "long-of-nonsense": exif_directory(4, 1, b"\xff\xff\xff\xff"),
    "offset-beyond-end": exif_directory(5, 1, b"\xff\xff\xff\xff"),
    "unknown-type": exif_directory(99, 1, b"\6"),
    "not-a-number": exif_directory(11, 1, struct.pack("<f", float("nan"))),
    "cut-short": b"II*\0\x08\0\0\0\xff\xff",
    "not-exif": b"nothing of the kind",
    "empty": b"",
    "next-is-itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "resolution-zero": b"II*\0\x08\0\0\0\2\0"
    + struct.pack("<HHIIHHIHH", 0x011A, 7, 0, 0, 0x0128, 3, 1, 2, 0)
    + bytes(4),
}
READABLE_EXIF = {
    "big-endian": exif_directory(3, 1, struct.pack(">H", 6), ">"),
    "long": exif_directory(4, 1, struct.pack("<I", 6)),
    "first-of-two": exif_directory(3, 2, struct.pack("<HH", 6, 3)),
    "rational": exif_directory(5, 1, struct.pack("<I", 26)) + struct.pack("<II", 6, 1),
    "float": exif_directory(11, 1, struct.pack("<f", 6.0)),
}


def with_exif(kind: str, exif: bytes, image: Image.Image) -> bytes:
    return encode_best(image, kind, exif=b"Exif\0\0" + exif)


def xmp(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
        b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>' % orientation
    )


def with_xmp(kind: str) -> bytes:
    image = Image.fromarray(stored_pixels(6))
    if kind == "JPEG":
        return into_jpeg(
            encode_best(image, kind), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6))
        )
    if kind == "PNG":
        return png(stored_pixels(6), 8, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)))
    if kind == "WEBP":
        return encode_best(image, kind, xmp=xmp(6))
    return tiff(tags([8] * 3, 2, (700, 1, list(xmp(6))), size=(32, 64)), stored_pixels(6).tobytes())


def items() -> list[Item]:
    found = [
        good(
            f"orientation-{orientation}-{kind}",
            with_orientation(kind, orientation),
            *([ORIENTATION] if orientation > 1 else []),
            tolerance=8,
        )
        for kind in KINDS
        for orientation in range(1, 9)
    ]
    found += [
        good(f"orientation-{orientation}-{kind}", with_orientation(kind, orientation), tolerance=8)
        for kind in KINDS[:4]
        for orientation in (0, 9, 77, 65535)
    ]
    found += [
        good(f"exif-{name}-{kind}", with_exif(kind, exif, scene()), tolerance=8)
        for kind in KINDS[:3]
        for name, exif in UNUSABLE_EXIF.items()
    ]
    six = Image.fromarray(stored_pixels(6))
    found += [
        good(f"exif-{name}-{kind}", with_exif(kind, exif, six), ORIENTATION, tolerance=8)
        for kind in KINDS[:3]
        for name, exif in READABLE_EXIF.items()
    ]
    found += [good(f"xmp-6-{kind}", with_xmp(kind), ORIENTATION, tolerance=8) for kind in KINDS[:4]]
    upright = exif_directory(3, 1, b"\1")
    # The second directory describes the thumbnail, whose orientation may differ.
    thumbnail = upright[:-4] + struct.pack("<I", 26) + exif_directory(3, 1, b"\6")[8:]
    found += [
        good(
            "exif-upright-xmp-6",
            encode_best(scene(), "WEBP", exif=b"Exif\0\0" + upright, xmp=xmp(6)),
        ),
        good(
            "exif-orientation-of-the-thumbnail-only",
            encode_best(scene(), "JPEG", exif=b"Exif\0\0" + thumbnail),
            tolerance=8,
        ),
        good(
            "tiff-broken-exif-directory",
            tiff(tags([8] * 3, 2, (34665, 4, [2**32 - 9])), SCENE.tobytes()),
        ),
        good(
            "tiff-orientation-as-float",
            tiff(tags([8] * 3, 2, (0x0112, 11, [6.0]), size=(32, 64)), stored_pixels(6).tobytes()),  # type: ignore[list-item]
            ORIENTATION,
        ),
    ]
    return found
