"""The demo page as it is sent. What it does in a browser: test_page_live.py."""

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
from serving.http.demo_page import POLICY, page
from serving.http.model_manager import ModelManager
from serving.imaging import decode as images
from serving.settings import Settings
from tests.support.page_fixture import Quiet, no_bentoml

HERE = Path(demo_page.__file__).parent
SCRIPT = (HERE / "demo.js").read_text()
STYLE = (HERE / "demo.css").read_text()
PAGE = page("tiny:0123456789ab").body.decode()


class Tags(HTMLParser):
    """Every start tag with its attributes, and what stands in scripts and styles."""

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


def asked(method: str) -> httpx.Response:
    """`/` of a service that has no model yet."""

    async def ask() -> httpx.Response:
        model_manager = ModelManager(Settings(bundle=Path("nowhere")), Quiet())
        transport = httpx.ASGITransport(app=App(no_bentoml, lambda: model_manager))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, "/")

    return asyncio.run(ask())


def test_it_comes_without_a_model_too():
    response = asked("GET")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["content-security-policy"] == POLICY
    assert "No model yet" in response.text
    head = asked("HEAD")
    assert head.content == b""
    assert head.headers["content-length"] == response.headers["content-length"]


def test_the_policy_names_what_is_in_the_page_and_nothing_else():
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
    # The policy would refuse these without a word.
    assert [a for _, a in tags.tags if any(n == "style" or n.startswith("on") for n in a)] == []


def test_nothing_is_fetched_from_elsewhere():
    attributes = [attributes for _, attributes in Tags(PAGE).tags]
    addresses = [a[name] for a in attributes for name in ("src", "href", "action") if name in a]
    assert {"docs", "model", "metrics"} < set(addresses)
    # Relative, so that a proxy may have the service below a path.
    assert [a for a in addresses if re.match(r"/|[a-z]+:", a) and a[:5] != "data:"] == []
    known = ("http://www.w3.org/2000/svg", "http://HOST:PORT")
    assert set(re.findall(r"https?://[\w.:/-]+", PAGE)) <= {*known, f"{known[1]}/predict"}
    assert not re.search(r"@import|url\(", STYLE)


def test_whatever_is_named_is_there_once_and_whatever_is_used_has_a_name():
    tags = Tags(PAGE).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'(?:\$|show|write|clear|on)\("([\w-]+)"', SCRIPT))
    for _, attributes in tags:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            named |= set(attributes.get(name, "").split())
    assert named - set(ids) == set()
    labels = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    assert {a["id"] for tag, a in tags if tag == "input"} <= labels
    assert all("alt" in attributes for tag, attributes in tags if tag == "img")


def test_it_is_small():
    assert len(PAGE.encode()) < 23_000


def test_the_script_makes_no_markup_and_keeps_nothing():
    banned = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|DOMParser"
    assert not re.search(banned, SCRIPT)
    assert not re.search(r"localStorage|sessionStorage|cookie|indexedDB|caches", SCRIPT)


def test_a_model_is_named_as_text():
    text = page('<script>alert("1")</script>$$name&lt;:v1').body.decode()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;$$name&amp;lt;" in text
    assert Tags(text).inside == Tags(PAGE).inside
    assert "tiny:0123456789ab" in PAGE


def named(table: str) -> set[str]:
    """The keys of a table of words in the script."""
    body = re.search(rf"^const {table} = {{$(.*?)^}};$", SCRIPT, re.MULTILINE | re.DOTALL)
    assert body
    return set(re.findall(r'^  "([^"]+)": "[^"]{10,}",$', body[1], re.MULTILINE))


def applied() -> Iterator[str]:
    """Every value that decoding may append to `applied`; of what it makes, the end."""
    for node in ast.walk(ast.parse(inspect.getsource(images))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "applied.append":
            for part in ast.walk(node.args[0]):
                if isinstance(part, ast.Constant) and re.search(r"[a-z]-|-[a-z]", str(part.value)):
                    yield str(part.value)


def test_all_that_is_done_to_an_image_has_words():
    values = set(applied())
    assert {"exif-orientation", "-to-rgb", "float-scaled"} < values
    assert values - {"-to-rgb"} == named("APPLIED")
    assert "(.+)-to-rgb$" in SCRIPT


def codes(kind: type[errors.FledgeError]) -> set[str]:
    return {kind.code}.union(*map(codes, kind.__subclasses__()))


def test_troubles_have_the_codes_of_the_service():
    ours = {"unreachable", "unreadable", "link"}
    assert named("TROUBLE") - codes(errors.FledgeError) == ours
    # Nothing raises their common root.
    assert codes(errors.ImageError) - named("TROUBLE") == {errors.ImageError.code}


def luminance(colour: str) -> float:
    low_latency_runtime = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
    parts = [int(low_latency_runtime[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_edges_stand_out(scheme: str):
    """WCAG 2.2 AA: 4.5 for text, 3 for what shows that something can be used."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([a-z-]+): #([0-9a-f]{3,6});", blocks[scheme == "dark"]))
    for ground in ("paper", "card", "wash"):
        for text in ("ink", "soft", "good", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["edge"], colours[ground]) >= 3, ground
    assert contrast(colours["on-good"], colours["good"]) >= 4.5
