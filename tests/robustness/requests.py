"""HTTP requests as bytes: valid ones, malformed forms, malformed request heads."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.robustness import mutate

FORM = b"multipart/form-data; boundary="
BOUNDARIES = (b"b", b'"b"', b"b; charset=utf-8", b"B" * 70, b"", b'""', b"B" * 257, b"a b", b"\xff")
BOUNDARIES += (b'"b', b"b=c", b"--", b"b\\", b"'()+_,-./:=?", b"b; boundary=c", b"=", b";")
DISPOSITIONS = (
    b'form-data; name="image"',
    b'form-data; name="image"; filename="x.jpg"',
    b"form-data; name=image",
    b'FORM-DATA; NAME="image"',
    b'form-data; name="im\\"age"',
    b"form-data; name*=utf-8''image",
    b"form-data; name*=nonsense''%ff%fe",
    b'form-data; name="image"; name="tta"',
    b'form-data; name="image',
    b"form-data; name*0=im; name*1=age",
    b'form-data; filename="\xc3\xa4\xff.jpg"; name="image"',
    b"form-data",
    b"",
    b"\xff\xfe",
    b"form-data; " + b"x" * 5000,
)
OPTIONS = (b"tta", b"top_k", b"image", b"", b"TTA", b"url", b"\xff")
VALUES = (
    b"0",
    b"1",
    b"2",
    b"3",
    b"-1",
    b"99",
    b"",
    b"x",
    b"1.5",
    b" 1",
    b"1e3",
    b"\xd9\xa1",
    b"9" * 400,
)
PATHS = (b"/predict", b"/predict", b"/predict", b"/predict/batch", b"/readyz", b"/model", b"/")
PATHS += (b"/predict/", b"//predict", b"/predict%00", b"/../predict", b"/nowhere", b"*", b"")
METHODS = (
    b"POST",
    b"POST",
    b"POST",
    b"GET",
    b"HEAD",
    b"PUT",
    b"OPTIONS",
    b"post",
    b"DELETE",
    b"QUERY",
)
NAMES = (b"Content-Type", b"Content-Length", b"Transfer-Encoding", b"Expect", b"Connection")
NAMES += (
    b"X-Request-ID",
    b"Authorization",
    b"Accept-Encoding",
    b"Content-Encoding",
    b"Host",
    b"Cookie",
)
TEXTS = (b"", b"chunked", b"gzip", b"100-continue", b"close", b"0", b"-1", b"1", b"999999999999")
TEXTS += (
    b"image/jpeg",
    b"multipart/form-data",
    b"upgrade",
    b"a" * 200,
    b"\xff\xfe",
    b"Bearer x",
    b"%00",
)


@dataclass(frozen=True)
class Case:
    """A request.

    kind: "images", a batch of pictures; "single", one picture; "form", a malformed form; "head", a
        malformed head.
    pictures: The pictures in the body; in a batch the first, third, ... are valid photos.
    method: The HTTP method in the request line.
    """

    kind: str
    raw: bytes
    pictures: tuple[bytes, ...] = ()
    method: str = "POST"


def request(path: bytes, body: bytes, content_type: bytes, method: bytes = b"POST") -> bytes:
    head = b"%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (method, path, content_type, len(body)) + body


def batch(pictures: tuple[bytes, ...]) -> Case:
    boundary = b"fuzz-2f7c9a1e"
    body = b"".join(_part(boundary, b'form-data; name="image"', data) for data in pictures)
    raw = request(b"/predict/batch", body + b"--" + boundary + b"--\r\n", FORM + boundary)
    return Case("images", raw, pictures)


def single(picture: bytes) -> Case:
    return Case("single", request(b"/predict", picture, b"image/png"), (picture,))


def form(rng: random.Random, pictures: list[bytes]) -> Case:
    """A multipart body, mostly with small errors."""
    boundary = rng.choice(BOUNDARIES) if rng.random() < 0.2 else b"b"
    inner = boundary.split(b";")[0].strip(b'"') or b"b"
    parts = []
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3, 3, 64, 65))):
        if rng.random() < 0.3:
            disposition = b'form-data; name="%s"' % rng.choice(OPTIONS)
            parts.append(_part(inner, disposition, rng.choice(VALUES)))
        else:
            odd = rng.choice(DISPOSITIONS) if rng.random() < 0.2 else DISPOSITIONS[0]
            parts.append(_part(inner, odd, rng.choice(pictures), rng))
    body = (
        b"".join(parts)
        + b"--"
        + inner
        + rng.choice((*[b"--\r\n"] * 6, b"--", b"", b"\r\n", b"--\r\nmore"))
    )
    body = rng.choice((*[b""] * 8, b"before\r\n", b"\r\n")) + body
    if rng.random() < 0.2:
        change = rng.choice((mutate.bits, mutate.octets, mutate.cut, mutate.drop, mutate.swap))
        body = change(rng, body, b"")
    if rng.random() < 0.05:
        body = body.replace(b"\r\n", b"\n")
    path = rng.choice((b"/predict", b"/predict/batch")) + _query(rng)
    kind = rng.choice(
        (
            FORM + boundary,
            FORM + boundary,
            FORM + boundary,
            b"multipart/form-data",
            b"Multipart/Form-Data;boundary=b",
            b"multipart/mixed; boundary=b",
        )
    )
    return Case("form", request(path, body, kind))


def head(rng: random.Random, pictures: list[bytes]) -> Case:
    """A random request line and headers, with a body of at most 5,000 bytes."""
    method = rng.choice(METHODS)
    version = rng.choice((b"HTTP/1.1",) * 30 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""))
    body = rng.choice(pictures)[:5000]
    lines = [b"%s %s %s" % (method, rng.choice(PATHS) + _query(rng), version), b"Host: localhost"]
    if rng.random() < 0.9:
        lines.append(b"Content-Length: %d" % len(body))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 80))):
        lines.append(
            rng.choice(NAMES) + rng.choice((*[b": "] * 5, b":", b" : ")) + rng.choice(TEXTS)
        )
    raw = rng.choice((b"\r\n",) * 30 + (b"\n",)).join(lines) + b"\r\n\r\n"
    if rng.random() < 0.15:
        raw = rng.choice((mutate.bits, mutate.octets, mutate.drop))(rng, raw, b"")
    return Case("head", raw + body, method=method.decode())


def _query(rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        return b""
    count = rng.choice((1, 1, 2, 3, 20))
    pairs = [rng.choice(OPTIONS[:6]) + b"=" + rng.choice(VALUES) for _ in range(count)]
    return b"?" + b"&".join(pairs).replace(b" ", b"+").replace(b"\xd9\xa1", b"%D9%A1")


def _part(
    boundary: bytes, disposition: bytes, data: bytes, rng: random.Random | None = None
) -> bytes:
    more = b""
    if rng and rng.random() < 0.3:
        more = rng.choice(
            (
                b"Content-Type: image/jpeg\r\n",
                b"Content-Transfer-Encoding: base64\r\n",
                b"Content-Type: multipart/mixed; boundary=c\r\n",
                b"X: y\r\n" * 20,
                b"no colon\r\n",
                b": no name\r\n",
            )
        )
    return b"--%s\r\nContent-Disposition: %s\r\n%s\r\n%s\r\n" % (boundary, disposition, more, data)
