"""What clients send in place of an image: JSON with base64 is read, all else is told by name."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shlex
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import live_server
from tests.support.live_server import Live, live
from tests.support.tiny_bundle import photo, tiny_bundle

PHOTO = photo(1, (200, 150))
TEXT = base64.b64encode(PHOTO).decode()
MAX_BYTES = 50_000
KEY = "secret-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), classes=3)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("server") / "log"
    with live(folder, log, FLEDGE_DEVICE="cpu", FLEDGE_MAX_BYTES=str(MAX_BYTES)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with live_server.client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def answer(client: httpx.Client) -> dict[str, Any]:
    """To the photo as the raw body."""
    return dict(client.post("/predict?tta=2&top_k=2", content=PHOTO).json())


def told(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert body["code"] == code
    return str(body["detail"])


# ---- base64 in JSON

WRAPPED = base64.encodebytes(PHOTO).decode()
FORMS_OF_BASE64 = {
    "standard": TEXT,
    "url-safe": base64.urlsafe_b64encode(PHOTO).decode(),
    "without padding": TEXT.rstrip("="),
    "in lines": WRAPPED,
    "in lines of CR LF": WRAPPED.replace("\n", "\r\n"),
    "data URL": f"data:image/png;base64,{TEXT}",
    "data URL with parameters": f"DATA:image/jpeg;charset=x;BASE64,{TEXT}",
    "data URL without a type": f"data:;base64,{TEXT}",
}


@pytest.mark.parametrize("form", FORMS_OF_BASE64)
def test_base64_in_json_gives_the_answer_of_the_file(
    client: httpx.Client, answer: dict[str, Any], form: str
):
    body = {"image": FORMS_OF_BASE64[form], "tta": 2, "top_k": 2}
    assert client.post("/predict", json=body).json() == answer
    images = {"images": [body["image"], TEXT], "tta": 2, "top_k": 2}
    assert client.post("/predict/batch", json=images).json() == [answer, answer]


@pytest.mark.parametrize(
    "escape",
    [
        lambda text: text.replace("/", "\\/"),  # PHP
        lambda text: text.replace("+", "\\u002B"),  # System.Text.Json of .NET
        lambda text: text.replace("=", "\\u003d").replace("/", "\\u002f"),  # Gson
        lambda text: "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),  # a shell
        lambda text: "".join(f"\\u{ord(letter):04x}" for letter in text),
    ],
    ids=["slashes", "plus signs", "equals signs", "raw line breaks", "everything"],
)
def test_json_escapes_in_base64_are_read(client: httpx.Client, answer: dict[str, Any], escape):
    body = f'{{"image": "{escape(TEXT)}", "tta": 2, "top_k": 2}}'
    headers = {"content-type": "application/json"}
    assert client.post("/predict", content=body, headers=headers).json() == answer


@pytest.mark.parametrize(
    "content_type",
    [
        *("application/json", "application/json; charset=utf-8", "Application/JSON"),
        *("application/vnd.api+json", "application/x-www-form-urlencoded", "text/plain", ""),
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff", " \r\n\t"])
def test_json_is_recognised_whatever_its_content_type(
    client: httpx.Client, answer: dict[str, Any], content_type: str, start: str
):
    body = start + json.dumps({"image": TEXT, "tta": 2})
    headers = {"content-type": content_type}
    response = client.post("/predict?top_k=2", content=body.encode(), headers=headers)
    assert response.json() == answer


def test_options_in_json_are_those_of_forms(client: httpx.Client, answer: dict[str, Any]):
    def post(**fields: object) -> httpx.Response:
        return client.post("/predict", json={"image": TEXT, **fields})

    assert post(tta="2", top_k=2).json() == answer
    assert post(tta=None, top_k=None).json() == client.post("/predict", content=PHOTO).json()
    for fields, text in (
        ({"tta": 1.5}, "tta = '1.5': use a whole number"),
        ({"tta": True}, "tta = 'true': use a whole number"),
        ({"tta": [1]}, "tta = '[1]': use a whole number"),
        ({"tta": "x" * 100}, f"tta = '{'x' * 40}': use a whole number"),
        ({"tta": 99}, "tta = 99"),
        ({"treshold": 1}, "unknown option 'treshold': use tta and top_k"),
        ({"treshold": None}, "unknown option 'treshold': use tta and top_k"),
        ({"x" * 100: 1}, f"unknown option '{'x' * 40}': use tta and top_k"),
    ):
        assert text in told(post(**fields), 400, "bad-option")
    twice = client.post("/predict?tta=1", json={"image": TEXT, "tta": 1})
    assert "tta is given twice" in told(twice, 400, "bad-option")


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({"file": TEXT}, "no-image", "no field `image` in the JSON; it has `file`"),
        ({}, "no-image", "no field `image` in the JSON; it has no fields"),
        ({"images": [TEXT]}, "no-image", "it has `images`"),
        ({str(n): n for n in range(20)}, "no-image", "`7` and 12 more"),
        ([TEXT], "bad-request", 'the JSON is an array, and must be {"image": …}'),
        (TEXT, "bad-request", 'the JSON is a text, and must be {"image": …}'),
        ({"image": [[0, 1], [2, 3]]}, "bad-request", "`image` is an array, and must be"),
        ({"image": {"b64": TEXT}}, "bad-request", "`image` is an object, and must be"),
        ({"image": None}, "bad-request", "`image` is null, and must be"),
        ({"image": 7}, "bad-request", "`image` is a number, and must be"),
        ({"image": ""}, "no-image", "it is empty: 0 bytes"),
        ({"image": "data:image/png;base64,"}, "no-image", "it is empty: 0 bytes"),
        ({"image": "https://a.example/x.jpg"}, "bad-request", "an address, and addresses are not"),
        ({"image": "photos/x.jpg"}, "bad-request", "the name of a file, not its content"),
        ({"image": "[object Blob]"}, "bad-request", "the name of an object of JavaScript"),
        ({"image": "data:image/png,%89PNG"}, "bad-request", "a data URL without `;base64,`"),
        ({"image": TEXT[:-9] + "*" + TEXT[-8:]}, "bad-request", "`image` is not base64"),
        ({"image": TEXT[:400] + "=" + TEXT[400:]}, "bad-request", "`image` is not base64"),
        ({"image": " " + TEXT}, "bad-request", "`image` is not base64"),
        (
            {"image": TEXT.rstrip("=") + "AAAAA"[: 1 + (-len(TEXT.rstrip("="))) % 4]},
            "bad-request",
            "not base64",
        ),
    ],
)
def test_other_json_is_told_with_what_it_has(client: httpx.Client, body: Any, code: str, text: str):
    detail = told(client.post("/predict", json=body), 400, code)
    assert text in detail
    assert detail.endswith(f"curl --data-binary @photo.jpg {client.base_url}/predict")


def test_json_that_can_not_be_read_is_told(client: httpx.Client):
    headers = {"content-type": "application/json"}
    for body, text in (
        ('{"image": "' + TEXT, "a text has no end"),
        ('{"image": "a", "image": "b"}', "'image' is there twice"),
        ("{'image': 'x'}", "the JSON can't be read"),
        ('{"image": NaN}', "the JSON can't be read"),
        ('{"image": "\\u00000"}', "it has the character U+0000"),
        ('{"image": "\\ud800"}', "the JSON can't be read"),
        (json.dumps({"image": TEXT}).encode("utf-16"), "text in UTF-16"),
        (json.dumps({"image": TEXT}).encode("utf-16-le"), "the JSON can't be read"),
    ):
        content = body.encode() if isinstance(body, str) else body
        response = client.post("/predict", content=content, headers=headers)
        assert response.status_code in (400, 415)
        assert text in response.json()["detail"]
        assert "char " not in response.json()["detail"]


def test_a_batch_of_json_has_an_answer_for_each_image(client: httpx.Client):
    broken = base64.b64encode(PHOTO[:900]).decode()
    page = base64.b64encode(b"<!DOCTYPE html><html>").decode()
    images = [TEXT, broken, page, "", TEXT]
    answers = client.post("/predict/batch", json={"images": images}).json()
    codes = [one.get("error", {}).get("code") for one in answers]
    assert codes == [None, "broken-image", "not-an-image", "no-image", None]
    assert "this is a web page (HTML)" in answers[2]["error"]["detail"]
    for body, code, text in (
        ({"images": []}, "no-image", "the array `images` is empty"),
        ({"images": TEXT}, "bad-request", "`images` is a text, and must be an array"),
        ({"images": [TEXT, 5]}, "bad-request", "`images[1]` is a number"),
        ({"images": [TEXT, "?"]}, "bad-request", "`images[1]` is not base64"),
        ({"images": ["QQ=="] * 65}, "bad-request", "more than 64 images in one request"),
        ({"image": TEXT}, "no-image", "no field `images` in the JSON; it has `image`"),
    ):
        assert text in told(client.post("/predict/batch", json=body), 400, code)


def test_the_limit_of_an_image_holds_for_json(client: httpx.Client):
    def post(size: int) -> httpx.Response:
        data = PHOTO + bytes(size - len(PHOTO))
        return client.post("/predict", json={"image": base64.b64encode(data).decode()})

    assert post(MAX_BYTES).status_code == 200
    assert f"{MAX_BYTES} are allowed" in told(post(MAX_BYTES + 1), 413, "too-large")
    told(post(3 * MAX_BYTES), 413, "too-large")
    # Without the Content-Type of JSON, a body may be as long as an image.
    body = json.dumps({"image": base64.b64encode(bytes(MAX_BYTES)).decode()})
    told(client.post("/predict", content=body), 413, "too-large")


# ---- what else comes

ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("x.jpg", PHOTO)
OTHERS = {
    "base64 text of an image (JPEG)": TEXT.encode(),
    "base64 text": base64.b64encode(bytes(range(256))),
    "a data URL": f"data:image/jpeg;base64,{TEXT}".encode(),
    "a web page (HTML)": b"\n<!DOCTYPE HTML><html><body>502 Bad Gateway</body></html>",
    "XML": b"<?xml version='1.0'?><Error/>",
    "an address, and addresses are not fetched": b"https://a.example/x.jpg",
    "the name of a file, not its content": b"/home/me/My Photos/x.JPG\n",
    "the name of an object of JavaScript, not its bytes": b"[object File]",
    "bytes as Python prints them": repr(PHOTO).encode(),
    "hexadecimal text": PHOTO.hex().encode(),
    "gzip data": gzip.compress(PHOTO),
    "a zip archive": ZIP.getvalue(),
    "a NumPy array": b"\x93NUMPY\x01\x00v\x00{'descr'",
    "a video": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "a pointer of Git LFS, not the file": b"version https://git-lfs.github.com/spec/v1\n",
    "text in UTF-16": "hello, this is text".encode("utf-16"),
    "zeros": bytes(1000),
    "text": "hällo, this is text".encode(),
    "JSON": b'[{"a": 1}]',
    "fields of a web form (application/x-www-form-urlencoded)": b"image=@photo.jpg&tta=1",
    "an image whose bytes were read and written as text": PHOTO.decode("latin-1").encode(),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_came_is_told_by_name_with_the_line_that_works(client: httpx.Client, what: str):
    data = OTHERS[what]
    line = f"curl --data-binary @photo.jpg {client.base_url}/predict"
    raw = told(client.post("/predict", content=data), 415, "not-an-image")
    form = told(client.post("/predict", files={"image": data}), 415, "not-an-image")
    for detail in (raw, form):
        assert re.fullmatch(
            rf"no image .*: this is {re.escape(what)}; .*: {re.escape(line)}", detail
        )
    (one,) = client.post("/predict/batch", files={"image": data}).json()
    assert f"this is {what}; " in one["error"]["detail"]
    assert one["error"]["detail"].endswith(
        f"curl -F image=@a.jpg -F image=@b.jpg {client.base_url}/predict/batch"
    )


@pytest.mark.parametrize("mode", ["utf-8", "ascii"])
def test_an_image_that_was_replaced_as_text_is_told(client: httpx.Client, mode: str):
    data = PHOTO.decode(mode, "replace").encode(mode, "replace")
    detail = told(client.post("/predict", content=data), 415, "not-an-image")
    assert "this is an image whose bytes were read and written as text; " in detail


def test_unknown_bytes_are_told_without_a_guess(client: httpx.Client):
    detail = told(client.post("/predict", content=b"\x01\x02\x03\x04" * 50), 415, "not-an-image")
    assert "this is" not in detail


def test_an_empty_body_and_a_form_without_the_field_are_told(client: httpx.Client):
    assert "it is empty: 0 bytes" in told(client.post("/predict"), 400, "no-image")
    files = {"file": PHOTO, "x" * 100: b"1"}
    detail = told(client.post("/predict", files=files), 400, "no-image")
    assert f"no field `image` in the form; it has `file`, `{'x' * 40}`; " in detail
    raw = told(client.post("/predict/batch", content=PHOTO), 400, "bad-request")
    assert raw.startswith("use several fields `image`, or JSON with `images`; ")
    two = [("image", PHOTO), ("image", PHOTO)]
    detail = told(client.post("/predict", files=two), 400, "bad-request")
    line = f"curl -F image=@a.jpg -F image=@b.jpg {client.base_url}/predict/batch"
    assert detail == f"more than one image; send several so: {line}"


def test_curl_with_d_instead_of_data_binary_is_told(client: httpx.Client, tmp_path: Path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(PHOTO)
    url = f"{client.base_url}/predict"
    sent = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "-d", f"@{path}", url], capture_output=True, check=True
    )
    detail = json.loads(sent.stdout)["detail"]
    assert detail.startswith("the file lost its zeros and line breaks: `curl -d @FILE` removes")
    assert detail.endswith(f"curl --data-binary @photo.jpg {url}")


@pytest.mark.parametrize("query", ["", "?tta=2&top_k=1", "?tta=2&x=';id;'"])
def test_the_told_line_works_when_it_is_pasted(
    server: Live, folder: Path, tmp_path: Path, query: str
):
    """With keys, with its query where that is plain, and for a batch."""
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(PHOTO)
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    headers = {"authorization": f"Bearer {KEY}"}
    with live(folder, tmp_path / "log", FLEDGE_API_KEYS_FILE=str(keys)) as other:
        for path in ("/predict", "/predict/batch"):
            response = live_server.post(f"{other.url}{path}{query}", b"{}", headers)
            line = response.json()["detail"].partition("curl ")[2].replace("KEY", KEY)
            if "use tta" in response.json()["detail"]:
                continue  # the option is wrong
            words = ["curl", "--noproxy", "*", "-sS", *shlex.split(line)]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
            found = json.loads(done.stdout)
            first = found if path == "/predict" else found[0]
            assert len(first["predictions"]) == (1 if "top_k=1" in query else 3)


# ---- Content-Encoding and Content-Type


@pytest.mark.parametrize(
    "coding", ["gzip", "x-gzip", "deflate", "br", "zstd", "GZIP, identity", "?"]
)
def test_a_content_coding_is_415_with_the_codings_that_are_accepted(
    client: httpx.Client, coding: str
):
    """RFC 9110, 12.5.3 and 15.5.16. Nothing is decompressed, so there are no bombs."""
    body = gzip.compress(PHOTO)
    for path in ("/predict", "/predict/batch"):
        response = client.post(path, content=body, headers={"content-encoding": coding})
        detail = told(response, 415, "unsupported-coding")
        assert response.headers["accept-encoding"] == "identity"
        assert f"the body has Content-Encoding '{coding}'" in detail
        assert "curl " in detail


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_the_coding_identity_is_accepted(client: httpx.Client, coding: str):
    response = client.post("/predict", content=PHOTO, headers={"content-encoding": coding})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        *("image/jpeg; charset=utf-8", "image/*", "image/jpeg;q=1", "application/octet-stream"),
        *("application/json", "text/html; charset=iso-8859-1", "x", "multipart/mixed; boundary=b"),
    ],
)
def test_a_photo_is_read_whatever_its_content_type(
    client: httpx.Client, answer: dict[str, Any], content_type: str
):
    headers = {"content-type": content_type}
    response = client.post("/predict?tta=2&top_k=2", content=PHOTO, headers=headers)
    assert response.json() == answer


def test_openapi_has_all_ways_to_send_an_image(client: httpx.Client):
    paths = client.get("/docs.json").json()["paths"]
    one = paths["/predict"]["post"]["requestBody"]["content"]
    several = paths["/predict/batch"]["post"]["requestBody"]["content"]
    assert one.keys() == {"multipart/form-data", "application/json", "image/*"}
    assert several.keys() == {"multipart/form-data", "application/json"}
    assert one["application/json"]["schema"]["required"] == ["image"]
    assert several["application/json"]["schema"]["properties"]["images"]["maxItems"] == 64
    assert {"400", "413", "415", "422"} <= paths["/predict"]["post"]["responses"].keys()
