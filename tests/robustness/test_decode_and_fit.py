"""Every combination of `decode` and `fit`, over the corpus and large photos of every format."""

from __future__ import annotations

import csv
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.errors import FledgeError
from serving.imaging.decode import decode
from serving.imaging.formats import SUFFIXES
from serving.imaging.preprocess import DECODES, FITS, Preprocess
from serving.inference.load import open_predictor
from serving.scoring.options import ScoringOptions
from serving.scoring.score import score
from tests.robustness import corpus, plugin_formats
from tests.robustness.large_photos import PHOTOS
from tests.robustness.scene import BLUE, RED, encode
from tests.support import live_server
from tests.support.live_server import live
from tests.support.tiny_bundle import tiny_bundle

SIZE = (501, 379)
LARGE = {name: build(*SIZE) for name, build in PHOTOS.items()}
FILES = {item.name: item.data for item in corpus.items()} | LARGE
del FILES["text-json"]  # the service reads it as a request in JSON
# Even the pictures of the corpus, most of 64 x 32, are reduced.
SMALLEST = {"size": 8, "crop": 1.0}
both = pytest.mark.parametrize("how", DECODES)
each_fit = pytest.mark.parametrize("fit", FITS)


def outcome(data: bytes, preprocess: Preprocess) -> tuple[object, ...]:
    try:
        decoded = decode(data, preprocess=preprocess)
    except FledgeError as error:
        # How much memory may be needed depends on the size that is decoded.
        return error.code, re.sub(r"\d+ MB", "MB", str(error))
    left, top, right, bottom = decoded.area
    assert 0 <= left < right <= decoded.image.width
    assert 0 <= top < bottom <= decoded.image.height
    return decoded.applied, decoded.mode, decoded.size


@pytest.mark.process
@each_fit
def test_scaled_decoding_refuses_and_converts_what_full_decoding_does(fit: str) -> None:
    full, scaled = (Preprocess(**SMALLEST, decode=how, fit=fit) for how in DECODES)
    assert scaled.reduction(64, 32) > 1
    wrong = {
        name: (outcome(data, full), found)
        for name, data in FILES.items()
        if (found := outcome(data, scaled)) != outcome(data, full)
    }
    assert wrong == {}


@each_fit
def test_a_large_photo_looks_the_same_at_a_reduced_size(fit: str) -> None:
    wrong = {}
    for name, data in LARGE.items():
        squares = []
        for how in DECODES:
            preprocess = Preprocess(size=64, decode=how, fit=fit)
            decoded = decode(data, preprocess=preprocess)
            assert (how == "scaled") == (decoded.image.width < min(SIZE)) or name == "gif-partial"
            squares.append(preprocess(decoded.image, decoded.area).astype(float))
        difference = np.abs(squares[0] - squares[1]).mean()
        if difference > 3:  # of 255; the dithered one is the largest
            wrong[name] = difference
    assert wrong == {}


def exif_with_thumbnail(thumbnail: bytes) -> bytes:
    entries = struct.pack("<HHII", 513, 4, 1, 44) + struct.pack("<HHII", 514, 4, 1, len(thumbnail))
    first = struct.pack("<2sHIHI", b"II", 42, 8, 0, 14)
    return b"Exif\0\0" + first + struct.pack("<H", 2) + entries + bytes(4) + thumbnail


def with_thumbnails() -> dict[str, bytes]:
    """Red photos that hold a smaller blue picture, as their thumbnail or second picture."""
    red, blue = Image.new("RGB", (1200, 900), RED), Image.new("RGB", (160, 120), BLUE)
    files = {"jpeg": encode(red, "JPEG", exif=exif_with_thumbnail(encode(blue, "JPEG")))}
    files["mpo"] = encode(red, "MPO", save_all=True, append_images=[blue])
    small = blue.copy()
    small.encoderinfo = {"tiffinfo": {254: 1}}  # a reduced image of another
    files["tiff"] = encode(red, "TIFF", save_all=True, append_images=[small])
    if plugin_formats.HAS_HEIF:
        files["heic"] = plugin_formats.heic(red, save_all=True, append_images=[blue])
        files["heic-thumbnail"] = plugin_formats.heic(red, thumbnails=[160])
    return files


@pytest.mark.parametrize("name", with_thumbnails())
def test_an_embedded_thumbnail_is_not_judged(name: str) -> None:
    """Whoever looks at the file sees the main picture, which a thumbnail need not resemble."""
    preprocess = Preprocess(size=64, decode="scaled", fit="squish")
    decoded = decode(with_thumbnails()[name], preprocess=preprocess)
    assert decoded.size == (1200, 900)
    assert decoded.image.size < (1200, 900)
    pixels = preprocess(decoded.image, decoded.area).astype(int)
    assert np.abs(pixels - RED).max() <= 4


@pytest.mark.process
@both
@each_fit
def test_service_and_scorer_answer_as_the_library(how: str, fit: str, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", **SMALLEST, decode=how, fit=fit)
    predictor = open_predictor(bundle, device="cpu")
    expected: dict[str, Any] = {}
    for name, data in FILES.items():
        try:
            answer = predictor.answer(predictor.predict([predictor.prepare(data)])[0])
        except FledgeError as error:
            expected[name] = error.code
        else:
            expected[name] = probabilities(answer["predictions"]), tuple(answer["applied"])
    assert wrong_answers(expected, served(bundle, tmp_path)) == {}
    assert wrong_answers(expected, scored(bundle, tmp_path)) == {}


def probabilities(predictions: list[dict[str, Any]]) -> dict[str, float]:
    return {one["label"]: one["probability"] for one in predictions}


def wrong_answers(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    assert expected.keys() == found.keys()
    wrong = {}
    for name, wanted in expected.items():
        if isinstance(wanted, str):
            right = found[name] == wanted
        else:
            right = found[name][1] == wanted[1] and found[name][0] == pytest.approx(
                wanted[0], abs=1e-4
            )
        if not right:
            wrong[name] = (found[name], wanted)
    return wrong


def served(bundle: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    env = {"FLEDGE_DEVICE": "cpu"}
    with live(bundle, folder / "log", **env) as server, live_server.client(server.url) as client:
        for name, data in FILES.items():
            headers = {"content-type": "image/jpeg"}
            answer = client.post("/predict", content=data, headers=headers).json()
            found[name] = (
                (probabilities(answer["predictions"]), tuple(answer["applied"]))
                if "predictions" in answer
                else answer["code"]
            )
    return found


def scored(bundle: Path, folder: Path) -> dict[str, Any]:
    (folder / "in").mkdir()
    for number, data in enumerate(FILES.values()):
        (folder / "in" / f"{number:04}{min(SUFFIXES)}").write_bytes(data)
    options = ScoringOptions(device="cpu", batch=7, workers=2)
    score([str(folder / "in")], bundle, folder / "scores.csv", options, log=lambda _: None)
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: (
            (dict(json.loads(row["top_k"])), tuple(filter(None, row["applied"].split(";"))))
            if row["status"] == "ok"
            else row["error"].partition(":")[0]
        )
        for name, row in zip(FILES, rows, strict=True)
    }
