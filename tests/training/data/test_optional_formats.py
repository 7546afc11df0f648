"""HEIC photos among others: trained on and scored with the package, told and counted without it."""

import csv
import sys
from io import BytesIO

import pytest
from PIL import Image

import fledge
from serving.errors import DataError
from serving.imaging.preprocess import Preprocess
from tests.robustness.plugin_formats import heic
from tests.support.tiny_bundle import photo, tiny_bundle
from training.data.dataset import load_dataset
from training.pixels import transform
from training.pixels.decoded import DecodedPhotos

REMEDY = "HEIC needs pillow-heif: pip install pillow-heif (container: make image EXTRAS=heif"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of ten JPEGs and two HEICs each, as from a phone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    for number in range(24):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = photo(number, (64, 48))
        if number >= 20:
            path = path.with_suffix(".HEIC")
            data = heic(Image.open(BytesIO(data)))
        path.write_bytes(data)
    return tmp_path / "photos"


def pixels_of(folder, log):
    dataset = load_dataset(str(folder))
    photos = DecodedPhotos(dataset, 1.25, log, 1)
    photos.pixel_sets(Preprocess(size=32))
    return photos.dataset


def test_with_the_package_they_are_photos_like_others(folder):
    lines = []
    dataset = pixels_of(folder, lines.append)
    assert len(dataset.train) + len(dataset.valid) == 24
    assert not [line for line in lines if "skipped" in line]


def test_without_it_training_stops_and_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError) as caught:
        pixels_of(folder, lambda line: None)
    assert "4 of 24 photos can't be read, for example " in str(caught.value)
    assert REMEDY in str(caught.value)


def test_photos_that_were_unreadable_are_read_once_the_package_is_there(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        transform._versions.cache_clear()
        with pytest.raises(DataError):
            pixels_of(folder, lambda line: None)
    transform._versions.cache_clear()
    dataset = pixels_of(folder, lambda line: None)
    assert len(dataset.train) + len(dataset.valid) == 24


def test_without_it_preview_counts_them_and_says_how_to_get_it(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert fledge.main(["preview", str(folder)]) == 0
    out = capsys.readouterr().out
    assert REMEDY in out
    assert "can't be read: 4\n" in out
    assert "hint: 4 photos can't be read; training refuses more than 5%" in out


@pytest.mark.process
def test_without_it_the_table_of_scores_has_a_row_for_each(folder, monkeypatch, tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    arguments = [str(folder), "--bundle", str(bundle), "--device", "cpu"]

    def rows(out):
        assert fledge.main(["score", *arguments, "--out", str(out), "--max-errors", "100%"]) == 0
        with out.open(newline="") as file:
            return list(csv.DictReader(file))

    with_package = rows(tmp_path / "with.csv")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    without = rows(tmp_path / "without.csv")
    assert [row["path"] for row in with_package] == [row["path"] for row in without]
    assert {row["status"] for row in with_package} == {"ok"}
    failed = [row for row in without if row["status"] == "error"]
    assert len(failed) == 4
    assert all(row["error"].startswith(f"unsupported-format: {REMEDY}") for row in failed)
