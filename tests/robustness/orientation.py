"""Orientation: what EXIF and XMP state, what they must not do, and EXIF that is broken."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from tests.robustness.file_builders import chunk, into_jpeg, png, segment, tags, tiff
from tests.robustness.scene import SCENE, Item, Pixels, fine, good, scene

KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
TURNED = "exif-orientation"


def stored(orientation: int) -> Pixels:
    """What a camera stores so that who obeys the tag sees the scene, as the EXIF standard says."""
    turned = {
        2: SCENE[:, ::-1],
        3: SCENE[::-1, ::-1],
        4: SCENE[::-1],
        5: SCENE.transpose(1, 0, 2),
        6: np.rot90(SCENE, 1),
        7: SCENE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(SCENE, -1),
    }.get(orientation, SCENE)
    return np.ascontiguousarray(turned)


def turned(kind: str, orientation: int) -> bytes:
    image = Image.fromarray(stored(orientation))
    if kind == "TIFF":
        return fine(image, kind, tiffinfo={0x0112: orientation})
    exif = Image.Exif()
    exif[0x0112] = orientation
    return fine(image, kind, exif=exif)


def directory(kind: int, count: int, value: bytes, order: str = "<", tag: int = 0x0112) -> bytes:
    """EXIF of one entry."""
    mark = {"<": b"II", ">": b"MM"}[order]
    entry = struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    return mark + struct.pack(order + "HIH", 42, 8, 1) + entry + bytes(4)


ODD = {
    "ascii": directory(2, 2, b"6"),
    "byte": directory(1, 1, b"\6"),
    "no-value": directory(3, 0, b""),
    "over-zero": directory(5, 1, struct.pack("<I", 26)) + struct.pack("<II", 6, 0),
    "long-of-nonsense": directory(4, 1, b"\xff\xff\xff\xff"),
    "beyond": directory(5, 1, b"\xff\xff\xff\xff"),
    "unknown-type": directory(99, 1, b"\6"),
    "not-a-number": directory(11, 1, struct.pack("<f", float("nan"))),
    "cut-short": b"II*\0\x08\0\0\0\xff\xff",
    "no-exif": b"nothing of the kind",
    "no-bytes": b"",
    "round": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "resolution-of-nothing": b"II*\0\x08\0\0\0\2\0"
    + struct.pack("<HHIIHHIHH", 0x011A, 7, 0, 0, 0x0128, 3, 1, 2, 0)
    + bytes(4),
}
FAIR = {
    "big-endian": directory(3, 1, struct.pack(">H", 6), ">"),
    "long": directory(4, 1, struct.pack("<I", 6)),
    "first-of-two": directory(3, 2, struct.pack("<HH", 6, 3)),
    "rational": directory(5, 1, struct.pack("<I", 26)) + struct.pack("<II", 6, 1),
    "float": directory(11, 1, struct.pack("<f", 6.0)),
}


def with_exif(kind: str, exif: bytes, image: Image.Image) -> bytes:
    return fine(image, kind, exif=b"Exif\0\0" + exif)


def xmp(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
        b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>' % orientation
    )


def with_xmp(kind: str) -> bytes:
    image = Image.fromarray(stored(6))
    if kind == "JPEG":
        return into_jpeg(
            fine(image, kind), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6))
        )
    if kind == "PNG":
        return png(stored(6), 8, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)))
    if kind == "WEBP":
        return fine(image, kind, xmp=xmp(6))
    return tiff(tags([8] * 3, 2, (700, 1, list(xmp(6))), size=(32, 64)), stored(6).tobytes())


def items() -> list[Item]:
    found = [
        good(
            f"turned-{orientation}-{kind}",
            turned(kind, orientation),
            *([TURNED] if orientation > 1 else []),
            tolerance=8,
        )
        for kind in KINDS
        for orientation in range(1, 9)
    ]
    found += [
        good(f"turned-{orientation}-{kind}", turned(kind, orientation), tolerance=8)
        for kind in KINDS[:4]
        for orientation in (0, 9, 77, 65535)
    ]
    found += [
        good(f"exif-{name}-{kind}", with_exif(kind, exif, scene()), tolerance=8)
        for kind in KINDS[:3]
        for name, exif in ODD.items()
    ]
    six = Image.fromarray(stored(6))
    found += [
        good(f"exif-{name}-{kind}", with_exif(kind, exif, six), TURNED, tolerance=8)
        for kind in KINDS[:3]
        for name, exif in FAIR.items()
    ]
    found += [good(f"xmp-6-{kind}", with_xmp(kind), TURNED, tolerance=8) for kind in KINDS[:4]]
    upright = directory(3, 1, b"\1")
    # The second directory describes the thumbnail, which may lie otherwise than the photo.
    thumbnail = upright[:-4] + struct.pack("<I", 26) + directory(3, 1, b"\6")[8:]
    found += [
        good(
            "exif-upright-xmp-6",
            fine(scene(), "WEBP", exif=b"Exif\0\0" + upright, xmp=xmp(6)),
        ),
        good(
            "exif-turns-the-thumbnail-only",
            fine(scene(), "JPEG", exif=b"Exif\0\0" + thumbnail),
            tolerance=8,
        ),
        good(
            "tiff-broken-exif-directory",
            tiff(tags([8] * 3, 2, (34665, 4, [2**32 - 9])), SCENE.tobytes()),
        ),
        good(
            "tiff-orientation-as-float",
            tiff(tags([8] * 3, 2, (0x0112, 11, [6.0]), size=(32, 64)), stored(6).tobytes()),  # type: ignore[list-item]
            TURNED,
        ),
    ]
    return found
