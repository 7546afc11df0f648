"""Recognise image formats by their first bytes.

The names of the formats appear in error messages about files that could not be decoded. Only the
first 4 KB of a file are matched, with regular expressions. Unsupported formats are never parsed.
"""

from __future__ import annotations

import re
from typing import Final

# BMP is left out, because its signature is two letters, with which a text may begin.
_SERVED: Final = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II[*+]\x00|MM\x00[*+]"),
    "AVIF": re.compile(rb"....ftyp(?:avi[fs]|(?:mif1|msf1).{4}(?:.{4}){0,15}?avi[fs])", re.DOTALL),
}

_UNSUPPORTED: Final = {
    "EPS": re.compile(rb"%!PS"),
    "PSD": re.compile(rb"8BPS"),
    "PDF": re.compile(rb"%PDF"),
    "HEIC": re.compile(rb"....ftyp(?:he[iv][cmsx]|mif1|msf1)", re.DOTALL),
    "ICO": re.compile(rb"\x00\x00[\x01\x02]\x00[^\x00]\x00.{3}\x00", re.DOTALL),
    "JPEG 2000": re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
    "JPEG XL": re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
    "JPEG XR": re.compile(rb"II\xbc"),
    "ICNS": re.compile(rb"icns"),
    "DDS": re.compile(rb"DDS "),
    "QOI": re.compile(rb"qoif"),
    "PCX": re.compile(rb"\x0a[\x00\x02-\x05]\x01[\x01\x02\x04\x08]"),
    "PNM": re.compile(rb"P[1-7F]\s+[#0-9W]|Pf\s+[0-9]"),
    "FITS": re.compile(rb"SIMPLE  ="),
    "SGI": re.compile(rb"\x01\xda[\x00\x01][\x01\x02]"),
    "OpenEXR": re.compile(rb"v/1\x01"),
    "Radiance HDR": re.compile(rb"#\?R(?:ADIANC|GB)E"),
    "WMF": re.compile(rb"\xd7\xcd\xc6\x9a"),
    # Prolog, comments and doctype may stand before the root element.
    "SVG": re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][^>]*>\s*)*<(?:svg:)?svg[\s>]"),
}


def served(data: bytes) -> str | None:
    """Return the name of the supported format whose signature `data` begins with, or None."""
    return _first(_SERVED, data)


def unsupported(data: bytes) -> str | None:
    """Return the name of the unsupported format whose signature `data` begins with, or None."""
    return _first(_UNSUPPORTED, data)


def _first(known: dict[str, re.Pattern[bytes]], data: bytes) -> str | None:
    head = data[:4096]
    return next((name for name, magic in known.items() if magic.match(head)), None)
