"""The service over HTTP: predictions, errors, metrics, and BentoML's own routes."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

import serving
from serving.bundle.manifest import Manifest
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from tests.support import live_server
from tests.support.live_server import Live, live, post
from tests.support.tiny_bundle import photo, tiny_bundle

HTTP_PAGE = (Path(__file__).parents[2] / "docs/http.md").read_text()
MAX_BYTES = 50_000
MAX_PIXELS = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), classes=7)


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return open_predictor(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("server") / "log"
    limits = {"FLEDGE_MAX_BYTES": str(MAX_BYTES), "FLEDGE_MAX_PIXELS": str(MAX_PIXELS)}
    with live(folder, log, FLEDGE_DEVICE="cpu", **limits) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with live_server.client(server.url) as client:
        yield client


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def rotated(seed: int) -> bytes:
    image = Image.open(io.BytesIO(photo(seed)))
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def expected(predictor: Predictor, data: bytes, tta: int = 0) -> dict[str, float]:
    prediction = predictor.predict([predictor.prepare(data, tta)])[0]
    return dict(zip(predictor.manifest.labels, prediction.probabilities, strict=True))


def check(answer: dict, probabilities: dict[str, float], top_k: int = 5) -> None:
    assert len(answer["predictions"]) == top_k
    for item in answer["predictions"]:
        assert item["probability"] == pytest.approx(probabilities[item["label"]], abs=1e-9)


def check_problem(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body.keys() == {"type", "title", "status", "detail", "code"}
    assert (body["status"], body["code"]) == (status, code)
    assert "Traceback" not in response.text
    rest = re.sub(r"curl .*|GET /|multipart/form-data|application/[a-z-]+", "", body["detail"])
    assert "/" not in rest  # no path of this machine


@pytest.mark.parametrize("tta", [0, 1, 4, 10])
def test_the_service_gives_the_answer_of_the_predictor(
    client: httpx.Client, predictor: Predictor, tta: int
):
    data = photo(1)
    response = client.post("/predict", params={"tta": tta, "top_k": 7}, content=data)
    assert response.status_code == 200
    answer = response.json()
    check(answer, expected(predictor, data, tta), 7)
    rest = {key: value for key, value in answer.items() if key != "predictions"}
    assert rest == {
        "model": predictor.model,
        "precision": "fp32",
        "views": max(1, tta),
        "confident": None,
        "out_of_distribution": None,
        "applied": [],
    }


def test_raw_body_and_form_give_the_same_answer(client: httpx.Client):
    data = photo(2)
    raw = client.post("/predict?tta=3&top_k=2", content=data)
    form = client.post("/predict?tta=3&top_k=2", files={"image": ("x.png", data, "text/plain")})
    fields = client.post("/predict", files={"image": data}, data={"tta": "3", "top_k": "2"})
    assert raw.status_code == 200
    assert raw.json() == form.json() == fields.json()


@pytest.mark.parametrize(
    "media_type", ["image/jpg", "image/png", "text/plain", "application/x-www-form-urlencoded", ""]
)
def test_the_media_type_has_no_effect(client: httpx.Client, media_type: str):
    data = photo(2)
    response = client.post("/predict", content=data, headers={"content-type": media_type})
    assert response.json() == client.post("/predict", content=data).json()


def test_tta_1_gives_the_answer_of_tta_0(client: httpx.Client):
    data = photo(3)
    answers = [client.post("/predict", params={"tta": tta}, content=data).json() for tta in (0, 1)]
    assert answers[0] == answers[1]


def test_conversions_are_in_the_answer(client: httpx.Client):
    answer = client.post("/predict", content=rotated(1)).json()
    assert "exif-orientation" in answer["applied"]
    assert client.post("/predict", content=png((40, 40), "RGBA")).json()["applied"]


def test_each_of_sixteen_clients_gets_the_answer_for_its_own_photo(
    server: Live, predictor: Predictor
):
    def call(seed: int) -> None:
        with live_server.client(server.url) as client:
            for step in range(4):
                data = photo(100 + seed * 4 + step)
                check(client.post("/predict", content=data).json(), expected(predictor, data))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(call, range(16)))


TRUNCATED = photo(5, (200, 200))[:1500]


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "no-image"),
        (b"hello, this is text", 415, "not-an-image"),
        (b"%!PS-Adobe-3.0", 415, "unsupported-format"),
        (TRUNCATED, 422, "broken-image"),
        (photo(1) + bytes(MAX_BYTES), 413, "too-large"),
        (png((1001, 1000), "L"), 413, "too-large"),
    ],
    ids=["empty", "text", "postscript", "truncated", "bytes", "pixels"],
)
def test_an_unusable_image_gives_the_status_and_code_of_its_error(
    client: httpx.Client, data: bytes, status: int, code: str
):
    check_problem(client.post("/predict", content=data), status, code)
    form = client.post("/predict", files={"image": data})
    check_problem(form, status, code)


def test_a_body_without_content_length_is_limited_too(client: httpx.Client):
    chunks = (bytes(10_000) for _ in range(10))
    check_problem(client.post("/predict", content=chunks), 413, "too-large")
    data = photo(1)
    answer = client.post("/predict", content=iter([data[:100], data[100:]])).json()
    assert answer == client.post("/predict", content=data).json()


@pytest.mark.parametrize(
    "query",
    [
        *("tta=11", "tta=-1", "tta=x", "tta=1.0", "tta=", "tta=1&tta=1"),
        *("top_k=0", "top_k=8", "top_k=-5", "top_k=1_0", "top_k=99999999999999999999"),
        *("url=http", "a=1&" * 20),
    ],
)
def test_an_invalid_query_option_is_400_bad_option(client: httpx.Client, query: str):
    check_problem(client.post(f"/predict?{query}", content=photo(1)), 400, "bad-option")


def test_an_invalid_form_gives_the_status_and_code_of_its_error(client: httpx.Client):
    form = "multipart/form-data; boundary=b"
    head = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
    for body, content_type, code in (
        (b"--b--\r\n", form, "no-image"),
        (head + photo(1), form, "bad-request"),
        (b"", form, "bad-request"),
        (b"not a form", form, "bad-request"),
        (head, "multipart/form-data", "bad-request"),
    ):
        response = client.post("/predict", content=body, headers={"content-type": content_type})
        check_problem(response, 400, code)
    missing = client.post("/predict", files={"picture": photo(1)})
    check_problem(missing, 400, "no-image")
    address = client.post("/predict", files={"image": (None, "http://127.0.0.1:1/x.jpg")})
    check_problem(address, 415, "not-an-image")
    two = [("image", photo(1)), ("image", photo(2))]
    check_problem(client.post("/predict", files=two), 400, "bad-request")
    many = [("image", b"x")] * 65
    check_problem(client.post("/predict/batch", files=many), 400, "bad-request")


def test_a_batch_answers_each_in_order(client: httpx.Client, predictor: Predictor):
    data = [photo(1), b"hello", photo(2), TRUNCATED, b"", photo(3)]
    files = [("image", (f"{n}.jpg", item)) for n, item in enumerate(data)]
    response = client.post("/predict/batch?tta=2&top_k=3", files=files)
    assert response.status_code == 200
    answers = response.json()
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes == [None, "not-an-image", None, "broken-image", "no-image", None]
    for answer, item in zip(answers, data, strict=True):
        if "error" not in answer:
            check(answer, expected(predictor, item, 2), 3)
            assert answer == client.post("/predict?tta=2&top_k=3", content=item).json()


def test_a_batch_with_wrong_options_is_refused(client: httpx.Client):
    files = {"image": photo(1)}
    check_problem(client.post("/predict/batch?tta=99", files=files), 400, "bad-option")
    check_problem(client.post("/predict/batch", content=photo(1)), 400, "bad-request")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/predict", 405, "method-not-allowed"),
        ("PUT", "/predict", 405, "method-not-allowed"),
        ("POST", "/readyz", 405, "method-not-allowed"),
        ("POST", "/metrics", 405, "method-not-allowed"),
        ("GET", "/nowhere", 404, "not-found"),
        ("POST", "/predict/", 404, "not-found"),
        ("GET", "/static_content/nowhere.js", 404, "not-found"),
    ],
)
def test_an_unknown_path_is_404_and_a_wrong_method_405(
    client: httpx.Client, method, path, status, code
):
    response = client.request(method, path)
    check_problem(response, status, code)
    assert ("allow" in response.headers) == (status == 405)


def test_request_ids_are_taken_over_or_generated(client: httpx.Client):
    data = photo(1)
    sent = client.post("/predict", content=data, headers={"x-request-id": "mine-1"})
    assert sent.headers["x-request-id"] == "mine-1"
    generated = [client.post("/predict", content=data).headers["x-request-id"] for _ in range(2)]
    assert generated[0] != generated[1]
    hostile = client.post("/predict", content=data, headers={"x-request-id": "a b<script>"})
    assert hostile.headers["x-request-id"] != "a b<script>"


def test_the_routes_for_health_model_page_and_openapi_answer(
    client: httpx.Client, predictor: Predictor
):
    assert client.get("/livez").status_code == 200
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["provider"] == "CPUExecutionProvider"
    model = client.get("/model").json()
    assert model.pop("serving") == {
        "precision": "fp32",
        "provider": "CPUExecutionProvider",
        "fledge": serving.__version__,
    }
    assert Manifest.from_json(json.dumps(model)) == predictor.manifest
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert predictor.model in page.text
    assert client.head("/").content == b""
    paths = client.get("/docs.json").json()["paths"]
    assert {"/predict", "/predict/batch"} <= paths.keys()
    answer = client.get("/docs")
    docs, policy = answer.text, answer.headers["content-security-policy"]
    assert "swagger" in docs
    assert "default-src 'none'" in policy
    assert "http" not in policy  # no other host
    assets = re.findall(r'"\.(/static_content/[^"]+)"', docs)
    assert [client.get(path).status_code for path in assets] == [200] * len(assets) != []


def test_metrics_count_outcomes_in_bounded_labels(client: httpx.Client):
    def count(text: str, outcome: str) -> float:
        name = f'fledge_requests_total{{outcome="{outcome}"}} '
        return sum(float(x.split()[-1]) for x in text.splitlines() if x.startswith(name))

    before = client.get("/metrics").text
    client.post("/predict", content=photo(1))
    client.post("/predict", content=b"text")
    client.post("/predict/batch", files=[("image", photo(1)), ("image", b"text")])
    for number in range(5):
        client.get(f"/nowhere/{number}")
    after = client.get("/metrics").text
    assert count(after, "ok") == count(before, "ok") + 2
    assert count(after, "not-an-image") == count(before, "not-an-image") + 2
    assert 'fledge_latency_seconds_bucket{le="1.0",phase="infer"}' in after
    assert "/nowhere" not in after


def test_the_page_on_http_lists_every_metric(client: httpx.Client):
    client.post("/predict", content=photo(1))
    text = client.get("/metrics").text
    real = set(re.findall(r"^# TYPE (fledge_\w+) ", text, re.MULTILINE))
    table = HTTP_PAGE.partition("## Metrics and log")[2].partition("They are sums")[0]
    assert set(re.findall(r"^\| `(fledge_\w+)`", table, re.MULTILINE)) == real
    best = client.post("/predict", content=photo(1)).json()["predictions"][0]["label"]
    assert f'fledge_predictions_total{{class="{best}"}}' in text


def test_the_client_of_bentoml_gets_the_same_answer(server: Live, folder: Path, tmp_path: Path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo(1))
    code = (
        "import sys, json, bentoml; from pathlib import Path\n"
        "with bentoml.SyncHTTPClient(sys.argv[1]) as client:\n"
        "    print(json.dumps(client.predict(image=Path(sys.argv[2]), tta=2, top_k=3)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, server.url, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = post(f"{server.url}/predict?tta=2&top_k=3", photo(1)).json()
    assert json.loads(done.stdout.splitlines()[-1]) == answer
