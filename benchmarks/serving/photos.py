"""The photos that are sent, and the requests that send them. Nothing is converted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

COUNT: Final = 50
LEAST: Final = 30_000
MOST: Final = 110_000
_BOUNDARY: Final = b"fledge-benchmark-5f1c"


def choose(folder: Path) -> list[Path]:
    """50 JPEGs of 30 to 110 kB, spread evenly over the sorted paths; the same ones every time.

    Raises:
        SystemExit: There are none.
    """
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg") and LEAST <= path.stat().st_size <= MOST
    ]
    if not found:
        raise SystemExit(f"--photos {folder}: no JPEG of {LEAST // 1000} to {MOST // 1000} kB")
    count = min(COUNT, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def requests(photos: Sequence[Path], port: int, path: str, field: str | None) -> list[bytes]:
    """A whole HTTP/1.1 request for each photo.

    Args:
        photos: Files.
        port: Of the server.
        path: What is asked for.
        field: The field of a multipart form; None sends the file as the body.
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
