"""The image formats: which are read, by what they are recognised, and what they need.

Formats are recognised by the first 4 KB of a file, with regular expressions. Their names appear in
error messages about files that could not be decoded. Unsupported formats are never parsed.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Final, NamedTuple

from serving.errors import UnsupportedFormat

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Names of the Pillow plug-ins that may open a file. Others, such as EPS, are never used."""


class OptionalFormat(NamedTuple):
    """A format that an optional package reads.

    Attributes:
        name: Name of the format, for messages.
        signature: What a file begins with.
        plugin: Name of the Pillow plug-in of the package.
        package: Import name of the package.
        distribution: Name by which the package is installed.
        extra: Extra of Fledge that installs the package.
        suffixes: File extensions of the format.
    """

    name: str
    signature: re.Pattern[bytes]
    plugin: str
    package: str
    distribution: str
    extra: str
    suffixes: tuple[str, ...]

    @property
    def installed(self) -> bool:
        """Whether the package is installed. It is not imported."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def remedy(self) -> str:
        """How to get the package."""
        return f"pip install {self.distribution} (container: make image EXTRAS={self.extra})"


OPTIONAL: Final = (
    OptionalFormat(
        "HEIC",
        re.compile(rb"....ftyp(?:he[iv][cmsx]|mif1|msf1)", re.DOTALL),
        *("HEIF", "pillow_heif", "pillow-heif", "heif", (".heic", ".heif", ".hif")),
    ),
    OptionalFormat(
        "JPEG XL",
        re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
        *("JXL", "pillow_jxl", "pillow-jxl-plugin", "jxl", (".jxl",)),
    ),
)
"""Formats that are read if their package is installed."""

SUFFIXES: Final = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".avif", *(suffix for one in OPTIONAL for suffix in one.suffixes)),
    }
)
"""File extensions by which images are found in folders. Decoding itself ignores file names."""

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
    "ICO": re.compile(rb"\x00\x00[\x01\x02]\x00[^\x00]\x00.{3}\x00", re.DOTALL),
    "JPEG 2000": re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
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
    """Return the name of the supported format whose signature `data` begins with, or None.

    An optional format is supported, too, even if its package is missing.
    """
    found = _first(_SERVED, data)
    if found is None and (optional := optional_format(data)):
        return optional.name
    return found


def optional_format(data: bytes) -> OptionalFormat | None:
    """Return the optional format whose signature `data` begins with, or None."""
    head = data[:32]
    found = next((one for one in OPTIONAL if one.signature.match(head)), None)
    # A HEIC and an AVIF may begin with the same brand.
    return None if found and _SERVED["AVIF"].match(data[:4096]) else found


def missing_format(name: str) -> OptionalFormat | None:
    """Return the format of a file name's suffix if the package that reads it is not installed."""
    suffix = os.path.splitext(name)[1].lower()
    return next((one for one in OPTIONAL if suffix in one.suffixes and not one.installed), None)


def check_installed(data: bytes) -> None:
    """Check that the package that reads an image is installed.

    Raises:
        UnsupportedFormat: The image is of an optional format whose package is missing; the message
            names the remedy.
    """
    found = optional_format(data)
    if found and not found.installed:
        raise UnsupportedFormat(
            f"{found.name} needs {found.distribution}: {found.remedy}; or use {readable()}"
        )


def readable() -> str:
    """Return the names of the formats that are read here, for messages."""
    return ", ".join((*FORMATS, *(one.name for one in OPTIONAL if one.installed)))


def unsupported(data: bytes) -> str | None:
    """Return the name of the unsupported format whose signature `data` begins with, or None."""
    return _first(_UNSUPPORTED, data)


def _first(known: dict[str, re.Pattern[bytes]], data: bytes) -> str | None:
    head = data[:4096]
    return next((name for name, magic in known.items() if magic.match(head)), None)
