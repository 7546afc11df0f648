"""Files that are not images, and images in formats that are refused without being parsed."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile

import numpy as np

from tests.robustness.plugin_formats import HAS_HEIF, HAS_JXL
from tests.robustness.scene import Item, bad, encode, encode_best, good, noise, scene

TEXTS = {
    "hello": b"hello",
    "html": b"<!doctype html><html><img src=cat.jpg></html>",
    "json": json.dumps({"image": "cat.jpg"}).encode(),
    "address": b"http://127.0.0.1:1/cat.jpg",
    "file-address": b"file:///etc/passwd",
    "path": b"/etc/passwd",
    "base64": b"data:image/png;base64,iVBORw0KGgo=",
    "bm": b"BMW is a car",
    "bm-and-no-more": b"BM",
    "gif": b"GIF is a format",
    "riff": b"RIFF and WEBP are words",
    "p5": b"P5 was a processor",
    "byte-order-mark": b"\xef\xbb\xbfhello",
    "utf-16": "hello".encode("utf-16"),
    "line-break": b"\n",
}
BINARY = {
    "one-byte-0": b"\0",
    "one-byte-255": b"\xff",
    "one-byte-b": b"B",
    "nul-bytes": bytes(1000),
    "nul-megabyte": bytes(1_000_000),
    "ones": b"\xff" * 1000,
    "noise": noise().tobytes(),
    "gzip": gzip.compress(encode_best(scene(), "JPEG"), mtime=0),
    "elf": b"\x7fELF\2\1\1" + bytes(57),
    "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(40),
    "mp3": b"ID3\4\0\0\0\0\0\0" + bytes(30),
    "pickle": pickle.dumps(print),
    "numpy": np.zeros(3).tobytes(),
    "half-a-jpeg-magic": b"\xff\xd8",
    "half-a-png-magic": b"\x89PNG",
}
SVG = {
    "plain": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "prolog": b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg width="1" height="1"/>',
    "doctype": b'\xef\xbb\xbf<!DOCTYPE svg PUBLIC "x" "y">\n<svg>',
    "prefix": b'  <svg:svg xmlns:svg="http://www.w3.org/2000/svg"/>',
}
HEIC = {
    "heic": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(60),
    "heic-mif1": b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic" + bytes(60),
    "heif-sequence": b"\0\0\0\x1cftyphevc\0\0\0\0hevcmif1" + bytes(60),
}
JPEG_XL = {
    "jpeg-xl": b"\xff\x0a\xfa\x1f" + bytes(20),
    "jpeg-xl-boxes": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20),
}
OTHER_FORMATS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(60),
    "pdf": b"%PDF-1.7\n" + encode_best(scene(), "JPEG"),
    "jpeg-xr": b"II\xbc\1" + bytes(20),
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "exr": b"v/1\1\2\0\0\0" + bytes(20),
    "hdr": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 4 +X 4\n" + bytes(64),
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "cur": b"\0\0\2\0\1\0\x10\x10\0\0\1\0\1\0\x30\0\0\0\x16\0\0\0" + bytes(48),
    "pfm": b"Pf\n4 4\n-1.0\n" + bytes(64),
}
# Written by Pillow: its plug-ins would read them if they were enabled.
WRITTEN_BY_PILLOW = {
    "unsupported-format": ("DDS", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI"),
    "not-an-image": ("BLP", "DIB", "IM", "MSP", "SPIDER", "TGA", "XBM"),
}
_MODES = {"BLP": "P", "MSP": "1", "SPIDER": "F", "XBM": "1", "ICNS": "RGBA"}


def written_by_pillow(kind: str) -> bytes:
    image = scene().resize((32, 32)) if kind in ("ICO", "ICNS") else scene()
    return encode(image.convert(_MODES.get(kind, "RGB")), kind)


def zip_archive(*files: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def items() -> list[Item]:
    none, other = "not-an-image", "unsupported-format"
    jpeg, png = encode_best(scene(), "JPEG"), encode_best(scene(), "PNG")
    found = [bad("empty", b"", "no-image")]
    found += [bad(f"text-{name}", data, none) for name, data in TEXTS.items()]
    found += [bad(f"binary-{name}", data, none) for name, data in BINARY.items()]
    found += [bad(f"svg-{name}", data, other) for name, data in SVG.items()]
    found += [bad(f"other-format-{name}", data, other) for name, data in OTHER_FORMATS.items()]
    found += [
        bad(f"optional-format-{name}", data, "broken-image" if installed else other)
        for formats, installed in ((HEIC, HAS_HEIF), (JPEG_XL, HAS_JXL))
        for name, data in formats.items()
    ]
    found += [
        bad(f"other-format-{kind.lower()}-by-pillow", written_by_pillow(kind), code)
        for code, kinds in WRITTEN_BY_PILLOW.items()
        for kind in kinds
    ]
    found += [
        bad("zip-with-a-photo", zip_archive(("cat.jpg", jpeg)), none),
        bad("html-before-a-photo", TEXTS["html"] + jpeg, none),
        bad("photo-behind-nul-bytes", bytes(16) + jpeg, none),
        good("photo-and-zip", jpeg + zip_archive(("cat.txt", b"meow")), tolerance=8),
        good("photo-and-script", png + b"<script>alert(1)</script>"),
        good("photo-and-pickle", png + pickle.dumps(print)),
    ]
    return found
