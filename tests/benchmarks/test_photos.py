"""`benchmarks.photos`, the check of the answers, an older checkout as a peer, the decoders."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks import before, machine, photos, results
from benchmarks.peers import jpeg_decoders
from benchmarks.photos import Kind
from benchmarks.scoring import race as scoring_race
from benchmarks.serving import decoders
from benchmarks.serving import race as serving_race
from serving.imaging.preprocess import Preprocess
from tests.support.tiny_bundle import photo, tiny_bundle


def given(folder: Path, count: int = 5) -> list[Path]:
    """Photos of 80 x 60 pixels."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(photo(number))
    return paths


def test_made_photos_are_as_phones_write_them(tmp_path: Path) -> None:
    sources = given(tmp_path, 2)
    made = photos.prepare(sources, "2mp", tmp_path / "out")
    for path, source, orientation in zip(made, sources, (1, 6), strict=True):
        with Image.open(path) as image:
            assert image.size == (1632, 1224)
            assert not image.info.get("progressive")
            assert image.layer[0][1:3] == (2, 2)  # type: ignore[attr-defined]  # 4:2:0
            assert image.getexif().get(0x0112, 1) == orientation
            upright = ImageOps.exif_transpose(image)
        assert photos.is_turned(path) == (orientation != 1)
        with Image.open(source) as small:
            same = ImageOps.fit(small.convert("RGB"), upright.size)
        shown, expected = (np.asarray(one.resize((32, 32)), np.float32) for one in (upright, same))
        assert np.abs(shown - expected).mean() < 2
        assert 300_000 < path.stat().st_size < 900_000


def test_made_photos_are_reused_unless_the_given_ones_change(tmp_path: Path) -> None:
    sources, kind = given(tmp_path), Kind(160, 120)
    first = [path.read_bytes() for path in photos.make_all(sources, kind, tmp_path / "out")]
    (tmp_path / "out" / "00000.jpg").write_bytes(b"kept")
    made = photos.make_all(sources, kind, tmp_path / "out")
    assert made[0].read_bytes() == b"kept"
    fewer = photos.make_all(sources[:3], kind, tmp_path / "out")
    assert [path.read_bytes() for path in fewer] == first[:3]


def test_photos_as_they_are_stay_the_default(tmp_path: Path) -> None:
    sources = given(tmp_path, 2)
    assert photos.prepare(sources, photos.GIVEN, tmp_path / "out") == sources
    assert photos.folder_of(photos.GIVEN, tmp_path) == tmp_path
    assert photos.folder_of("12mp", tmp_path) == tmp_path / "12mp"
    names = results.parse_names("given,12mp,given", photos.NAMES, "--kinds")
    assert names == ["given", "12mp"]
    with pytest.raises(SystemExit, match="--kinds: no 3mp; there are given, thumbnail, 2mp, 12mp"):
        results.parse_names("12mp,3mp", photos.NAMES, "--kinds")


@dataclass
class Row:
    """The fields of a race's row that the check of the answers reads."""

    peer: str
    answers: int
    others: int
    turned: int = 0
    turned_others: int = 0


def test_other_labels_of_turned_photos_are_told_apart() -> None:
    assert results.other_labels([Row("x", 100, 0)]) == "0"
    assert results.other_labels([Row("x", 100, 3), Row("x", 100, 0)]) == "1.5 %"
    assert results.other_labels([Row("x", 100, 21, 50, 20)]) == "2.0 %, turned 40.0 %"


def test_a_peer_whose_labels_differ_too_often_fails_the_race() -> None:
    @dataclass
    class Peer:
        name: str

    peers = [Peer("fledge"), Peer("onnx"), Peer("torch")]
    turned = [Row("fledge", 100, 2, 40, 1), Row("onnx", 100, 30, 40, 30), Row("torch", 100, 2)]
    assert results.disagreements(peers, turned) == []
    wrong = [Row("fledge", 100, 9, 40, 9), Row("onnx", 100, 10), Row("torch", 100, 5)]
    assert [line.split(" ")[0] for line in results.disagreements(peers, wrong)] == [
        "fledge:",
        "onnx:",
    ]


def test_kinds_of_photos_follow_one_another_within_a_round() -> None:
    @dataclass
    class Peer:
        settings: tuple[str, ...]

    a, b = Peer(("x", "y")), Peer(("z",))
    jobs = [(n, kind, setting) for n, kind, _, setting in results.jobs([a, b], 2, ["s", "l"])]
    first = [(0, kind, setting) for kind in ("s", "l") for setting in ("x", "y", "z")]
    assert jobs == first + [
        (1, kind, setting) for kind in ("s", "l") for setting in ("z", "x", "y")
    ]


def test_an_older_checkout_needs_its_environment_and_a_bundle_that_it_opens(tmp_path: Path) -> None:
    def options(checkout: Path | None) -> argparse.Namespace:
        return argparse.Namespace(before=checkout, before_bundle=None, bundle=tmp_path / "bundle")

    assert before.of(options(None)) is None
    with pytest.raises(SystemExit, match="run `make install` there"):
        before.of(options(tmp_path))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    (tmp_path / "fledge.py").touch()
    (tmp_path / "bundle").mkdir()
    manifest = tmp_path / "bundle" / "manifest.json"
    for decode, accepted in (({}, True), ({"decode": "full"}, True), ({"decode": "scaled"}, False)):
        manifest.write_text(json.dumps({"name": "a", "version": "b", "preprocess": decode}))
        if accepted:
            checkout = before.of(options(tmp_path))
            assert checkout is not None
            assert checkout.describe() == "before: no git checkout; bundle a:b"
        else:
            with pytest.raises(SystemExit, match="decodes at a reduced size"):
                before.of(options(tmp_path))
    assert "before" not in before.default_peers(["fledge", "before"], None)
    assert "before" in before.default_peers(["fledge", "before"], tmp_path)
    with pytest.raises(SystemExit, match="name an older checkout, --before CHECKOUT"):
        before.require(["fledge", "before"], None)


@pytest.mark.parametrize("race", [scoring_race, serving_race])
def test_races_refuse_a_bundle_of_which_the_peers_would_see_another_part(
    race: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", fit="pad")
    words = ["race", "--bundle", str(bundle), "--photos", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match=r"its preprocess\.fit is pad"):
        race.main()
    machine.require_crop(tiny_bundle(tmp_path / "other"))


def test_decoders_compute_the_square_that_fledge_computes(tmp_path: Path) -> None:
    path = tmp_path / "made.jpg"
    photos.make(given(tmp_path, 1)[0], (2100, 1401), path)
    data = path.read_bytes()
    squares = {
        name: jpeg_decoders.DECODERS[name]()(data)
        for name in jpeg_decoders.DECODERS
        if name.startswith(("pillow", "fledge"))
    }
    assert np.array_equal(squares["pillow"], squares["fledge-full"])
    assert np.array_equal(squares["pillow-draft2"], squares["fledge-scaled"])
    for name, square in squares.items():
        assert square.shape == (224, 224, 3), name
        assert np.abs(square.astype(int) - squares["pillow"]).mean() < 1, name
    assert not np.array_equal(squares["pillow"], squares["pillow-draft2"])


def test_the_draft_is_that_of_the_preprocessing() -> None:
    preprocess = Preprocess(decode="scaled")
    for size in ((516, 387), (1632, 1224), (4032, 3024), (3024, 4032), (8064, 6048)):
        most = preprocess.reduction(*size)
        scale = jpeg_decoders.reduction(size, 2)
        assert scale <= most < 2 * scale or scale == 8


def test_the_table_has_the_ratio_of_the_draft_within_a_round() -> None:
    measured = {
        "pillow-draft2": decoders.Measured({"12": [10, 20, 30]}, {"12": 0.2}, {"12": 5.0}),
        "simplejpeg": decoders.Measured({"12": [5, 20, 10]}, {"12": 0.2}, {"12": 6.0}),
        "pyvips": decoders.Measured(failed="no libvips"),
    }
    page = decoders.tables(measured, ["12"])
    assert "| simplejpeg | 10.0 | 2.00 | 0.20 | 6 |" in page
    assert "pyvips, `shrink`: not measured: no libvips" in page
