"""Say what data is that is no image. Only its first 4 KB are looked at."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from serving.imaging import formats

_HEAD: Final = 4096  # bytes that are looked at
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/_\r\n-]{16,}={0,2}\s*", re.DOTALL)

_KINDS: Final[tuple[tuple[str, re.Pattern[bytes]], ...]] = tuple(
    (name, re.compile(pattern, re.IGNORECASE | re.DOTALL))
    for name, pattern in (
        ("a data URL", rb"\s*data:[^,\s]{0,200},"),
        ("a web page (HTML)", rb"\s*(?:<!--.{0,500}?-->\s*)?<(?:!doctype\s+html|html|head|body)\b"),
        ("XML", rb"\s*<\?xml\b"),
        ("an address, and addresses are not fetched", rb"\s*[a-z][a-z0-9+.-]{1,20}://"),
        ("the name of an object of JavaScript, not its bytes", rb"\[object \w{1,40}\]\s*$"),
        ("bytes as Python prints them", rb"b(?:'[^']{0,40}\\x|\"[^\"]{0,40}\\x)"),
        (
            "fields of a web form (application/x-www-form-urlencoded)",
            rb"[a-z_][\w.%\[\]-]{0,63}=[^=\s]",
        ),
        (
            "the name of a file, not its content",
            rb"@?[^\0-\x1f<>|\"]{1,250}\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf]|jxl)\s*$",
        ),
        (
            "a multipart form, and the header Content-Type does not say so",
            rb"\s*--[^\r\n]{1,256}\r?\ncontent-",
        ),
        ("hexadecimal text", rb"(?:0x)?(?:ffd8ff|89504e47|47494638|52494646)[0-9a-f]{8}"),
        ("JSON", rb"(?:\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}\d-]"),
        (
            "an image whose bytes were read and written as text",  # as UTF-8, or replaced
            rb"\xc3\xbf\xc3\x98\xc3\xbf|\xc2\x89PNG|\?PNG|(?:\xef\xbf\xbd|\?){1,6}"
            rb"(?:PNG|.{0,4}(?:JFIF|Exif))",
        ),
        ("gzip data", rb"\x1f\x8b\x08"),
        ("zstd data", rb"\x28\xb5\x2f\xfd"),
        ("bzip2 data", rb"BZh[1-9]1AY"),
        ("xz data", rb"\xfd7zXZ\0"),
        ("a zip archive", rb"PK(?:\x03\x04|\x05\x06)"),
        ("a tar archive", rb".{257}ustar"),
        ("a NumPy array", rb"\x93NUMPY"),
        ("a pickle of Python", rb"\x80[\x02-\x05][\x80-\x9f}\]\]c(]"),
        ("a video", rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]"),
        ("a pointer of Git LFS, not the file", rb"version https://git-lfs"),
        ("text in UTF-16", rb"\xff\xfe(?:[\t -~]\0){4}|\xfe\xff(?:\0[\t -~]){4}|(?:[\t -~]\0){8}"),
        ("zeros", rb"\0{64}"),
        ("text", rb"[\t\r\n -~\x80-\xff]{1,4096}$"),
    )
)
"""Name of a kind of data -> how it begins, the first that matches. No served image begins so."""


def describe(data: bytes) -> str:
    """Return what data is that is no image, such as "a web page (HTML)"; "" if that is unknown."""
    head = data[:_HEAD]
    if form := _base64_of(head):
        return form
    for name, pattern in _KINDS:
        if pattern.match(head):
            return name if name != "text" or _is_utf8(head) else ""
    return ""


def _base64_of(head: bytes) -> str:
    if not _BASE64.fullmatch(head):
        return ""
    letters = head[:64].translate(bytes.maketrans(b"-_", b"+/"), b"\r\n=")
    try:
        start = base64.b64decode(letters[: len(letters) // 4 * 4])
    except binascii.Error:  # cut within the padding
        start = b""
    if name := formats.served(start) or formats.unsupported(start):
        return f"base64 text of an image ({name})"
    mixed = all(re.search(one, head) for one in (rb"[A-Z]", rb"[a-z]", rb"[0-9]"))
    return "base64 text" if mixed and len(head) >= 64 else ""


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.end > len(head) - 4 and len(head) == _HEAD  # cut within a character
    return True
