"""Class names stay text in the drawings of the report, whatever they contain."""

from __future__ import annotations

import html
from xml.etree import ElementTree

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import texts
from training.report import charts

MARKUP = st.sampled_from(["</svg><script>", '" onload="x', "<!--", "]]>", "&lt;", "{{ 7 * 7 }}"])
NAMES = st.lists(texts(surrogates=True, min_size=1) | MARKUP, min_size=1, max_size=5, unique=True)
TITLES = texts(surrogates=True, min_size=1) | MARKUP


def elements(drawing: str) -> list[str]:
    return [element.tag for element in parsed(drawing).iter()]


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(html_references_as_text(drawing))


def html_references_as_text(drawing: str) -> str:
    """The drawing is HTML; the XML parser refuses characters that HTML allows."""
    return "".join(one if one.isprintable() or one == "\n" else "\ufffd" for one in drawing)


@given(NAMES, TITLES, st.integers(0, 99))
@examples(60)
def test_names_are_text_in_the_confusion_matrix(names, title, seed) -> None:
    matrix = np.random.default_rng(seed).integers(0, 3, (len(names), len(names)))
    drawing = str(charts.confusion(matrix, names, title))
    plain = [f"c{number}" for number in range(len(names))]
    assert elements(drawing) == elements(str(charts.confusion(matrix, plain, "t")))
    shown = [element.text for element in parsed(drawing).iter("title")]
    # Each class has a title in its row and in its column.
    expected = [html_references_as_text(charts.printable(name)) for name in names for _ in range(2)]
    assert shown[: len(expected)] == expected
    assert html.unescape(str(charts.text(title))) == charts.printable(title)


@given(NAMES, TITLES)
@examples(60)
def test_names_are_text_beside_intervals(names, title) -> None:
    rows = [(name, 0.5, (0.4, 0.6)) for name in names]
    drawing = str(charts.intervals(rows, title))
    assert elements(drawing) == elements(
        str(charts.intervals([("n", *row[1:]) for row in rows], "t"))
    )
    root = parsed(drawing)
    assert root.get("aria-label") == html_references_as_text(charts.printable(title))
