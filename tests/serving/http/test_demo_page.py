"""The demo page as it is sent. Its behaviour in a browser: test_demo_page_live.py."""

import ast
import asyncio
import base64
import hashlib
import inspect
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from serving import errors
from serving.http import demo_page
from serving.http.app import App
from serving.http.demo_page import POLICY, render
from serving.http.model_manager import ModelManager
from serving.imaging import colours, decode
from serving.settings import Settings
from tests.support.page_fixture import NoTelemetry, no_bentoml

HERE = Path(demo_page.__file__).parent
SCRIPT = (HERE / "demo.js").read_text()
STYLE = (HERE / "demo.css").read_text()
PAGE = render("tiny:0123456789ab").body.decode()


class Tags(HTMLParser):
    """All start tags with their attributes, and the contents of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inside: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inside.append((self.tags[-1][0], data))


def directives(policy: str) -> dict[str, list[str]]:
    return {name: words for name, *words in (part.split() for part in policy.split(";"))}


def request_page(method: str) -> httpx.Response:
    """`/` of a service that has no model."""

    async def send() -> httpx.Response:
        model_manager = ModelManager(Settings(bundle=Path("nowhere")), NoTelemetry())
        transport = httpx.ASGITransport(app=App(no_bentoml, lambda: model_manager))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", trust_env=False
        ) as client:
            return await client.request(method, "/")

    return asyncio.run(send())


def test_the_page_is_sent_without_a_model_too():
    response = request_page("GET")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["content-security-policy"] == POLICY
    assert "No model yet" in response.text
    head = request_page("HEAD")
    assert head.content == b""
    assert head.headers["content-length"] == response.headers["content-length"]


def test_the_policy_allows_only_the_inline_script_and_style():
    policy = directives(POLICY)
    tags = Tags(PAGE)
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        texts = [text for kind, text in tags.inside if kind == tag]
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert policy.pop(name) == [f"'sha256-{digest}'" for digest in digests] != []
    assert policy == {
        "default-src": ["'none'"],
        "img-src": ["'self'", "blob:", "data:"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }
    # The browser would silently ignore these because of the policy.
    assert [a for _, a in tags.tags if any(n == "style" or n.startswith("on") for n in a)] == []


def test_nothing_is_loaded_from_another_host():
    attributes = [attributes for _, attributes in Tags(PAGE).tags]
    addresses = [a[name] for a in attributes for name in ("src", "href", "action") if name in a]
    assert {"docs", "model", "metrics"} < set(addresses)
    # Relative, so that a proxy can put the service under a path.
    assert [a for a in addresses if re.match(r"/|[a-z]+:", a) and a[:5] != "data:"] == []
    known = ("http://www.w3.org/2000/svg", "http://HOST:PORT")
    assert set(re.findall(r"https?://[\w.:/-]+", PAGE)) <= {*known, f"{known[1]}/predict"}
    assert not re.search(r"@import|url\(", STYLE)


def test_ids_are_unique_and_controls_have_labels():
    tags = Tags(PAGE).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referenced = set(re.findall(r'(?:\$|show|write|clear|on)\("([\w-]+)"', SCRIPT))
    for _, attributes in tags:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            referenced |= set(attributes.get(name, "").split())
    assert referenced - set(ids) == set()
    labels = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    assert {a["id"] for tag, a in tags if tag == "input"} <= labels
    assert all("alt" in attributes for tag, attributes in tags if tag == "img")


def test_the_page_is_small():
    assert len(PAGE.encode()) < 26_000


def test_the_script_writes_no_markup_and_stores_nothing():
    banned = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|DOMParser"
    assert not re.search(banned, SCRIPT)
    assert not re.search(r"localStorage|sessionStorage|cookie|indexedDB|caches", SCRIPT)


def test_the_name_of_a_model_is_escaped():
    text = render('<script>alert("1")</script>{{ name }}&lt;:v1').body.decode()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;{{ name }}&amp;lt;" in text
    assert Tags(text).inside == Tags(PAGE).inside
    assert "tiny:0123456789ab" in PAGE


def keys_of(table: str) -> set[str]:
    """The keys of a table of texts in the script."""
    body = re.search(rf"^const {table} = {{$(.*?)^}};$", SCRIPT, re.MULTILINE | re.DOTALL)
    assert body
    return set(re.findall(r'^  "([^"]+)": "[^"]{10,}",$', body[1], re.MULTILINE))


def applied() -> Iterator[str]:
    """All values that decoding may append to `applied`; of computed values the constant part."""
    source = inspect.getsource(decode) + inspect.getsource(colours)
    for node in ast.walk(ast.parse(source.replace("from __future__ import annotations", ""))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "applied.append":
            for part in ast.walk(node.args[0]):
                if isinstance(part, ast.Constant) and re.search(r"[a-z]-|-[a-z]", str(part.value)):
                    yield str(part.value)


def test_every_conversion_of_an_image_has_a_text():
    values = set(applied())
    assert {"exif-orientation", "-to-rgb", "float-scaled"} < values
    assert values - {"-to-rgb"} == keys_of("APPLIED")
    assert "(.+)-to-rgb$" in SCRIPT


def codes(kind: type[errors.FledgeError]) -> set[str]:
    return {kind.code}.union(*map(codes, kind.__subclasses__()))


def test_every_error_code_has_a_text():
    local = {"unreachable", "unreadable", "link"}
    assert keys_of("ERRORS") - codes(errors.FledgeError) == local
    # The base class itself is never raised.
    assert codes(errors.ImageError) - keys_of("ERRORS") == {errors.ImageError.code}


def luminance(colour: str) -> float:
    digits = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(scheme: str):
    """WCAG 2.2 AA: 4.5 for text, 3 for what shows that something can be used."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([a-z-]+): #([0-9a-f]{3,6});", blocks[scheme == "dark"]))
    for ground in ("paper", "card", "wash"):
        for text in ("ink", "soft", "good", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["edge"], colours[ground]) >= 3, ground
    assert contrast(colours["on-good"], colours["good"]) >= 4.5
