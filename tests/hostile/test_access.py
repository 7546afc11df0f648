"""Web pages of other sites, DNS rebinding, and CORS."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from serving.http.access import Access
from serving.server.launch import _serve_name
from tests.support.live_server import Live, client, free_port, launch, live
from tests.support.tiny_bundle import photo

SITE = "https://photos.example"


def raw(server: Live, *fields: str, start: str = "GET /readyz HTTP/1.1") -> tuple[int, str]:
    """Send a head; returns the status and the response."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        lines = (start, *fields, "Connection: close", "", "")
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return int(answer.split(" ", 2)[1]), answer


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:{port}",
        "127.1.2.3",
        "[::1]:3000",
        "localhost.",
        "[::1]",
    ],
)
def test_names_of_loopback_are_served(server: Live, host: str):
    for path in ("/readyz", "/livez", "/", "/docs", "/metrics"):
        status, _ = raw(
            server, f"Host: {host.format(port=server.port)}", start=f"GET {path} HTTP/1.1"
        )
        assert status == 200


@pytest.mark.parametrize(
    "fields",
    [
        (),
        ("Host: localhost", "Host: localhost"),
        ("Host: localhost", "host: evil.example"),
        ("Host:",),
        ("Host: evil.example",),
        ("Host: evil.example:80",),
        ("Host: localhost.evil.example",),
        ("Host: evil.example@localhost",),
        ("Host: localhost/",),
        ("Host: localhost, localhost",),
        ("Host: localhost:80:80",),
        ("Host: 192.0.2.1",),
        ("Host: [::2]",),
        ("Host: 127.0.0.1.nip.example",),
        ("Host: 2130706433",),
        ("Host: loc\xe4lhost",),
        ("Host: " + "a" * 5000,),
    ],
)
def test_other_hosts_are_refused_on_every_path(server: Live, fields: tuple[str, ...]):
    for path in ("/readyz", "/livez", "/metrics", "/", "/docs", "/nowhere"):
        status, answer = raw(server, *fields, start=f"GET {path} HTTP/1.1")
        assert (status, '"code":"bad-request"' in answer) == (400, True)
    status, _ = raw(server, *fields, "Content-Length: 0", start="POST /predict HTTP/1.1")
    assert status == 400


def test_a_client_of_http_1_0_may_leave_out_the_host(server: Live):
    assert raw(server, start="GET /readyz HTTP/1.0")[0] == 200
    assert raw(server, "Host: evil.example", start="GET /readyz HTTP/1.0")[0] == 400


PAGES = {
    "none": ({}, 200),
    "own": ({"Origin": "http://{host}"}, 200),
    "own, by fetch": ({"Origin": "http://{host}", "Sec-Fetch-Site": "same-origin"}, 200),
    "typed": ({"Sec-Fetch-Site": "none"}, 200),
    "behind TLS": ({"Origin": "https://own.example", "Sec-Fetch-Site": "same-origin"}, 200),
    "other": ({"Origin": SITE}, 403),
    "other, by fetch": ({"Origin": SITE, "Sec-Fetch-Site": "cross-site"}, 403),
    "other, without origin": ({"Sec-Fetch-Site": "cross-site"}, 403),
    "same site": ({"Origin": "http://localhost:1", "Sec-Fetch-Site": "same-site"}, 403),
    "other port": ({"Origin": "http://localhost:1"}, 403),
    "sandboxed": ({"Origin": "null"}, 403),
    "nonsense": ({"Origin": "http://"}, 403),
    "empty": ({"Origin": ""}, 403),
}


@pytest.mark.parametrize("page", PAGES)
def test_posts_of_other_sites_are_refused(server: Live, page: str):
    fields, status = PAGES[page]
    host = f"127.0.0.1:{server.port}"
    headers = {name: value.format(host=host) for name, value in fields.items()}
    with client(server.url) as caller:
        answer = caller.post("/predict", content=photo(1), headers=headers)
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
        if status == 403:
            assert answer.json()["code"] == "cross-site"
        assert caller.get("/model", headers=headers).status_code == 200  # the page can't read it


def test_without_setting_there_is_no_cors(server: Live):
    headers = {"Origin": SITE, "Access-Control-Request-Method": "POST"}
    with client(server.url) as caller:
        answer = caller.options("/predict", headers=headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_listed_origins_may_use_the_model(folder: Path, tmp_path: Path):
    origins = f"{SITE} http://localhost:8080"
    with (
        live(folder, tmp_path / "log", FLEDGE_CORS_ORIGINS=origins) as server,
        client(server.url) as caller,
    ):
        wish = {"Access-Control-Request-Method": "POST"}
        wish["Access-Control-Request-Headers"] = "authorization,content-type"
        for path, methods in (
            ("/predict", "POST"),
            ("/predict/batch", "POST"),
            ("/model", "GET"),
        ):
            answer = caller.options(path, headers={"Origin": SITE, **wish})
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == SITE
            assert methods in answer.headers["access-control-allow-methods"]
            assert "authorization" in answer.headers["access-control-allow-headers"]
            assert answer.headers["vary"].lower() == "origin"
        cross = {"Origin": SITE, "Sec-Fetch-Site": "cross-site"}
        for data, status in ((photo(1), 200), (b"text", 415)):
            answer = caller.post("/predict", content=data, headers=cross)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == SITE
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        other = {"Origin": "https://photos.example.org"}
        answer = caller.options("/predict", headers={**other, **wish})
        assert answer.status_code == 405
        answer = caller.post("/predict", content=photo(1), headers=other)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_all_origins_may_be_allowed(folder: Path, tmp_path: Path):
    with (
        live(folder, tmp_path / "log", FLEDGE_CORS_ORIGINS="*") as server,
        client(server.url) as caller,
    ):
        for origin in (SITE, "null"):
            answer = caller.post("/predict", content=photo(1), headers={"Origin": origin})
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "*"


def test_fledge_hosts_adds_names(folder: Path, tmp_path: Path):
    with live(folder, tmp_path / "log", FLEDGE_HOSTS="Photos.example, other.example") as server:
        for host in ("photos.example", "other.example:443", "localhost", "127.0.0.1"):
            assert raw(server, f"Host: {host}")[0] == 200
        assert raw(server, "Host: evil.example")[0] == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLEDGE_HOSTS", "https://a.example"),
        ("FLEDGE_HOSTS", "a.example:80"),
        ("FLEDGE_CORS_ORIGINS", "a.example"),
        ("FLEDGE_CORS_ORIGINS", "https://a.example/"),
        ("FLEDGE_CORS_ORIGINS", "https://*.example"),
    ],
)
def test_wrong_names_are_refused_at_the_start(folder: Path, tmp_path: Path, name: str, value: str):
    log = tmp_path / "log"
    assert launch(folder, free_port(), log, **{name: value}).wait(30) == 2
    assert log.read_text().count("\n") == 1
    assert name in log.read_text()


def scope(host: str, address: str, method: str = "GET") -> dict:
    headers = [(b"host", host.encode())]
    return {"http_version": "1.1", "method": method, "headers": headers, "server": (address, 80)}


@pytest.mark.parametrize(
    ("hosts", "listening", "host", "served"),
    [
        ((), ["0.0.0.0"], "photos.example", True),
        ((), ["0.0.0.0"], "not a host", False),
        ((), ["192.0.2.7"], "photos.example", True),
        ((), ["127.0.0.1"], "photos.example", False),
        ((), ["::1"], "photos.example", False),
        ((), [], "photos.example", True),  # a Unix socket
        (("*",), ["127.0.0.1"], "photos.example", True),
        (("a.example",), ["0.0.0.0"], "a.example:3000", True),
        (("a.example",), ["0.0.0.0"], "b.example", False),
        (("a.example",), ["0.0.0.0"], "192.0.2.7:3000", True),  # the address of the connection
        (("a.example",), ["0.0.0.0"], "192.0.2.8:3000", False),
        (("a.example",), ["0.0.0.0"], "localhost", True),
    ],
)
def test_names_are_checked_on_loopback_or_where_they_are_listed(hosts, listening, host, served):
    access = Access(hosts, (), lambda: listening)
    refusal = access.refusal(scope(host, "192.0.2.7"), {})
    assert (refusal is None) == served


@pytest.mark.parametrize(
    ("host", "address", "hosts"),
    [
        ("mybox", "127.0.1.1", "photos.example mybox"),
        ("localhost", "127.0.0.1", "photos.example"),
        ("127.0.0.1", "127.0.0.1", "photos.example"),
        ("mybox", "192.0.2.7", "photos.example"),  # every name is served there
    ],
)
def test_the_name_that_is_listened_on_is_served(host: str, address: str, hosts: str):
    env = {"FLEDGE_HOSTS": "photos.example"}
    _serve_name(host, address, env)
    assert env["FLEDGE_HOSTS"] == hosts
