"""Choose the photos of the race and build their HTTP requests, with the files' own bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

SUFFIXES: Final = (".jpg", ".jpeg")
COUNT: Final = 50
MIN_BYTES: Final = 30_000
MAX_BYTES: Final = 110_000
_BOUNDARY: Final = b"fledge-benchmark-5f1c"


def choose(folder: Path) -> list[Path]:
    """50 JPEGs of 30 to 110 kB, spread evenly over the sorted paths.

    Raises:
        SystemExit: The folder has none.
    """
    jpegs = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    usable = [path for path in jpegs if MIN_BYTES <= path.stat().st_size <= MAX_BYTES]
    if not usable:
        sizes = f"{MIN_BYTES // 1000} to {MAX_BYTES // 1000} kB"
        raise SystemExit(f"--photos {folder}: no JPEG of {sizes}")
    count = min(COUNT, len(usable))
    return [usable[i * len(usable) // count] for i in range(count)]


def requests(photos: Sequence[Path], port: int, path: str, field: str | None) -> list[bytes]:
    """A complete HTTP/1.1 request for each photo.

    Args:
        photos: Files.
        port: Of the server.
        path: Of the request, such as `/predict`.
        field: Field of a multipart form; None sends the file as the body.
    """
    return [_request(photo.read_bytes(), photo.name, port, path, field) for photo in photos]


def _request(data: bytes, name: str, port: int, path: str, field: str | None) -> bytes:
    media = b"image/jpeg"
    if field:
        part = (
            f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        data = b"".join(
            (b"--", _BOUNDARY, b"\r\n", part.encode(), data, b"\r\n--", _BOUNDARY, b"--\r\n")
        )
        media = b"multipart/form-data; boundary=" + _BOUNDARY
    lines = (
        f"POST {path} HTTP/1.1".encode(),
        f"Host: 127.0.0.1:{port}".encode(),
        b"Accept: */*",
        b"Content-Type: " + media,
        f"Content-Length: {len(data)}".encode(),
    )
    return b"\r\n".join(lines) + b"\r\n\r\n" + data
