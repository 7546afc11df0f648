"""Laws of the names that the demo page and the metrics show: they stay text."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.http import demo_page
from serving.http.telemetry import CLASSES, Telemetry
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import texts

MARKUP = st.sampled_from(
    ["</title><script>alert(1)</script>", '" onload="x', "<!--", "{{ 7 * 7 }}", "&lt;", "a\n# HELP"]
)
NAMES = texts() | MARKUP


class Page(HTMLParser):
    """The tags and attributes of a page, and the texts of two elements."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[object] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))
        self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(tag)
        self._inside = ""

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")

    def handle_data(self, data: str) -> None:
        if self._inside in ("title", "name", "version"):
            self.texts[self._inside] = self.texts.get(self._inside, "") + data


@given(NAMES, NAMES)
@examples(60)
def test_a_model_name_is_text_in_the_demo_page(name, version) -> None:
    version = version.replace(":", "")
    page = Page(demo_page.render(f"{name}:{version}").body.decode())
    assert page.tags == Page(demo_page.render("m:1").body.decode()).tags
    assert page.texts["title"] == f"{name}:{version} · Fledge"
    assert page.texts.get("name", "") == (name or "No model yet")
    assert page.texts.get("version", "") == version


@pytest.fixture(scope="module")
def telemetry():
    before = set(REGISTRY._collector_to_names)
    yield Telemetry()
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


@given(st.lists(NAMES, min_size=1, max_size=4, unique=True), NAMES, NAMES)
@examples(25)
def test_class_and_model_names_are_read_back_from_the_metrics(
    telemetry, labels, model, other
) -> None:
    telemetry.serving(model, "fp32", "CPUExecutionProvider", labels)
    before = counts()
    for label in (*labels, labels[0]):
        prediction = {"label": label, "probability": 0.5}
        telemetry.answered({"predictions": [prediction], "out_of_distribution": None})
    after = counts()
    grown = {label: after[label] - before.get(label, 0) for label in after}
    expected = {label: 1.0 + (label == labels[0]) for label in labels}
    assert {label: count for label, count in grown.items() if count} == expected
    assert samples("fledge_model", "model")[model] == 1
    telemetry.retired(model, "fp32", "CPUExecutionProvider")
    assert samples("fledge_model", "model")[model] == 0


def test_classes_beyond_the_limit_share_one_counter(telemetry) -> None:
    labels = [f"limit-{number}" for number in range(CLASSES + 2)]
    telemetry.serving("limit:1", "fp32", "cpu", labels)
    before = counts().get("other", 0)
    for label in labels:
        prediction = {"label": label, "probability": 0.5}
        telemetry.answered({"predictions": [prediction], "out_of_distribution": None})
    assert counts()["other"] == before + 2
    assert not {"limit-100", "limit-101"} & counts().keys()


def counts() -> dict[str, float]:
    return samples("fledge_predictions_total", "class")


def samples(name: str, label: str) -> dict[str, float]:
    text = generate_latest(REGISTRY).decode()
    return {
        sample.labels[label]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


@given(texts(surrogates=True), texts(surrogates=True), st.floats(0, 1000))
@examples(60)
def test_an_access_log_record_is_one_line_of_json(telemetry, path, request_id, seconds) -> None:
    lines: list[str] = []
    handler = telemetry._log.handlers[0]
    emit, handler.emit = handler.emit, lambda record: lines.append(handler.format(record))
    try:
        telemetry.log(request_id, "GET", path, 404, "not-found", seconds)
    finally:
        handler.emit = emit
    (line,) = lines
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    expected = json.loads(json.dumps({"path": path, "request": request_id}))
    assert {name: found[name] for name in expected} == expected
