"""What a decoder process answers is checked before it is used: a broken image may control it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.errors import BrokenImage
from serving.imaging import isolated
from serving.imaging.preprocess import Preprocess

REQUEST = {"max_pixels": 100, "preprocess": Preprocess(8).to_dict(), "too_large": "too large"}
ANSWER = {
    **{"shape": [4, 6, 3], "applied": ["first-frame"], "mode": "RGB"},
    **{"size": [12, 8], "area": [0.0, 0.0, 6.0, 4.0]},
}


def head(request: dict[str, Any], **changed: object) -> dict[str, Any]:
    line = json.dumps({**ANSWER, **changed}).encode()
    found, rest = isolated._split_head(bytearray(line + b"\nxy"), request)
    assert found is not None
    assert rest == b"xy"
    return found


def test_an_answer_has_the_size_of_the_picture_and_its_box_in_the_image() -> None:
    found = head(REQUEST)
    assert (found["size"], found["area"]) == ((12, 8), (0, 0, 6, 4))
    assert found["bytes"] == 4 * 6 * 3


@pytest.mark.parametrize(
    "changed",
    [
        {"size": [12, 9]},  # more than max_pixels
        {"size": [12]},
        {"size": [12, -8]},
        {"size": [12, 8.0]},
        {"shape": [101, 1, 3]},
        {"shape": [4, 6, 4]},
        {"shape": [4, 6]},
        {"area": [0, 0, 6.1, 4]},
        {"area": [0, 2, 6, 2]},
        {"area": [0, 0, 6, float("nan")]},
        {"area": [0, 0, 10**400, 4]},
        {"area": [0, 0, 6]},
        {"area": None},
        {"applied": None},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_an_answer_that_cant_be_true_is_a_broken_image(changed: dict[str, object]) -> None:
    with pytest.raises(BrokenImage, match="its decoder gave no answer"):
        head(REQUEST, **changed)


def test_views_have_the_shape_that_was_asked_for() -> None:
    request = REQUEST | {"views": [["plain"], ["flip"]]}
    assert head(request, shape=[2, 8, 8, 3])["bytes"] == 2 * 8 * 8 * 3
    for shape in ([1, 8, 8, 3], [2, 8, 9, 3], [4, 6, 3]):
        with pytest.raises(BrokenImage):
            head(request, shape=shape)
