"""Cases of the parity gate: its limits, what a refusal says, and which golden images are chosen."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import parity
from export.parity import Agreement, ParityReport
from serving.bundle.manifest import Manifest
from serving.errors import DataError, GateError
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import softmax
from serving.inference.predictor import Predictor

PREPROCESS = Preprocess(size=16, background=(255, 0, 128))
MANIFEST = Manifest(
    name="m",
    version="v",
    arch="a",
    labels=("red", "green", "blue"),
    preprocess=PREPROCESS,
    precisions={},
    files={},
    temperature=2.0,
)


class Means:
    """A runtime whose logits are the means of the channels."""

    provider = "numpy"

    def __init__(self, change: Callable[[Any], Any] = lambda logits: logits) -> None:
        self.change = change
        self.batches: list[int] = []

    def run(self, pixels: Any) -> tuple[Any, Any]:
        assert pixels.dtype == np.uint8
        self.batches.append(len(pixels))
        logits = pixels.astype(np.float64).mean(axis=(1, 2)) / 32
        return self.change(logits), logits


def png(*colour: int) -> bytes:
    file = io.BytesIO()
    mode = "RGBA" if len(colour) == 4 else "RGB"
    Image.new(mode, (20, 16), colour).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, *colours: tuple[int, ...]) -> list[tuple[Path, int]]:
    """A photo of one colour each; the class is that of the strongest channel."""
    samples = []
    for number, colour in enumerate(colours):
        path = folder / f"{number:02}.PNG"
        path.write_bytes(png(*colour))
        samples.append((path, int(np.argmax(colour[:3]))))
    return samples


def gate(samples: Any, *changes: Any, log: Any = lambda line: None) -> ParityReport:
    graphs = {f"graph{n}": Predictor(MANIFEST, Means(change)) for n, change in enumerate(changes)}
    return parity.gate(Means(), PREPROCESS, graphs, samples, log=log)


def same(logits: Any) -> Any:
    return logits


COLOURS = [(200, 30, 60), (10, 220, 20), (90, 20, 130), (0, 0, 255), (0, 0, 0, 0)]


def test_figures_are_those_of_the_photos_and_of_each_graph(tmp_path: Path) -> None:
    samples = write(tmp_path, *COLOURS)
    samples[1] = (samples[1][0], 0)  # classified wrongly by the checkpoint and the graphs
    report = gate(samples, same, same)
    assert (report.photos, report.skipped, report.checkpoint) == (5, 0, 4)
    assert report.classes == {0: (3, 2), 2: (2, 2)}
    assert report.accuracy == {"checkpoint": 0.8, "graph0": 0.8, "graph1": 0.8}
    for agreement in report.graphs.values():
        assert agreement.right == 4
        assert agreement.differences.keys() == {path for path, _ in samples}
        assert agreement.difference == max(agreement.differences.values()) < 1e-9
    assert report.to_dict()["classes"] == [
        {"class": 0, "photos": 3, "right": 2},
        {"class": 2, "photos": 2, "right": 2},
    ]


def test_photos_go_through_the_graphs_in_every_batch_size(tmp_path: Path) -> None:
    samples = write(tmp_path, *[COLOURS[0]] * 16)
    checkpoint, graph = Means(), Means()
    graphs = {"onnx": Predictor(MANIFEST, graph)}
    parity.gate(checkpoint, PREPROCESS, graphs, samples)
    assert checkpoint.batches == [14, 2]
    assert graph.batches == [*[1] * 14, *[2] * 7, 7, 7, 1, 1, 2, 2]


def test_the_checkpoint_is_compared_at_the_temperature_of_the_manifest(tmp_path: Path) -> None:
    samples = write(tmp_path, *COLOURS)
    answers = parity._score(samples, Means(), PREPROCESS, {"a": Predictor(MANIFEST, Means())})
    pixels = np.array([[[c[:3] if len(c) == 3 else PREPROCESS.background]] for c in COLOURS])
    logits, _ = Means().run(pixels.astype(np.uint8))
    assert answers.truth == pytest.approx(softmax(logits, 2.0), abs=1e-12)
    assert answers.truth != pytest.approx(softmax(logits, 1.0), abs=1e-3)
    assert [array.shape for array in answers.answers["a"]] == [(5, 3)] * 3


def test_a_refusal_names_the_graph_the_photo_and_how_many_change(tmp_path: Path) -> None:
    samples = write(tmp_path, *COLOURS)
    lines: list[str] = []

    def turned(logits: Any) -> Any:
        return np.where(
            np.argmax(logits, 1, keepdims=True) == 1, logits[:, ::-1] - [0, 8, 0], logits
        )

    with pytest.raises(GateError) as refused:
        gate(samples, same, turned, log=lines.append)
    off = float(lines[1].split()[0])
    assert str(refused.value) == (
        f"graph1 and the checkpoint give different answers: a probability of {samples[1][0]} is "
        f"off by {off:.2g}, tolerance 1e-04 (1 of 5 photos change their best class); no bundle "
        "was written"
    )
    assert lines[0] == "graph1: the photos with the largest differences"
    assert lines[1] == f"  {off:.2g}  {samples[1][0]}, another best class"
    assert len(lines) == 1 + 5
    assert all(float(line.split()[0]) < 1e-9 for line in lines[2:])


def report_of(**agreement: Any) -> ParityReport:
    return ParityReport(9, 0, 9, {"onnx": Agreement(**agreement)}, {})


def test_the_tolerance_itself_is_accepted() -> None:
    parity._check_agreement(report_of(difference=parity.TOLERANCE), pytest.fail)
    above = np.nextafter(parity.TOLERANCE, 1)
    with pytest.raises(GateError, match=r"a probability of a is off by 0\.0001, tolerance 1e-04"):
        parity._check_agreement(report_of(difference=above, worst="a"), lambda line: None)


def test_another_best_class_is_refused_within_the_tolerance() -> None:
    lines: list[str] = []
    agreement = {"differences": {"a": 1e-5, "b": 2e-5, "c": 3e-5}, "changed": {"b", "a"}}
    with pytest.raises(GateError, match="the best class of a changed \\(2 of 9 photos"):
        parity._check_agreement(report_of(**agreement), lines.append)
    assert lines[1:] == [
        "  3e-05  c",
        "  2e-05  b, another best class",
        "  1e-05  a, another best class",
    ]


def test_the_five_largest_differences_are_logged() -> None:
    lines: list[str] = []
    differences = {f"photo{n}": n / 10 for n in range(1, 8)}
    with pytest.raises(GateError):
        parity._check_agreement(
            report_of(difference=0.7, worst="photo7", differences=differences), lines.append
        )
    assert [line.split()[1] for line in lines[1:]] == [f"photo{n}" for n in (7, 6, 5, 4, 3)]


def test_differences_are_the_largest_of_all_batch_sizes() -> None:
    truth = np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]])
    agreement = Agreement()
    for first, second in ((0.0, 0.02), (0.03, 0.0), (0.01, 0.05), (-0.04, 0.0)):
        off = np.array([[first, 0, 0], [0, 0, second]])
        parity._compare(agreement, truth, truth + off, ["one", "two"])
    assert agreement.differences == pytest.approx({"one": 0.04, "two": 0.05})
    assert (agreement.difference, agreement.worst) == (pytest.approx(0.05), "two")
    assert (agreement.ties, agreement.changed) == (set(), set())


def test_of_equal_differences_the_first_photo_is_the_worst() -> None:
    agreement = Agreement()
    truth = np.array([[0.75, 0.25], [0.75, 0.25]])
    parity._compare(agreement, truth, truth + 0.125, ["one", "two"])
    assert (agreement.difference, agreement.worst) == (0.125, "one")


def test_a_graph_that_answers_fewer_photos_is_not_compared() -> None:
    truth = np.array([[0.75, 0.25], [0.75, 0.25]])
    for answers, paths in ((truth[:1], ["one", "two"]), (truth, ["one"])):
        with pytest.raises(ValueError, match="shorter"):
            parity._compare(Agreement(), truth, answers, paths)


def test_nan_is_the_largest_difference() -> None:
    truth = np.array([[0.75, 0.25], [0.75, 0.25]])
    agreement = Agreement()
    parity._compare(agreement, truth, np.array([[np.nan, 0.25], [0.75, 0.25]]), ["one", "two"])
    assert agreement.differences == {"one": np.inf, "two": 0.0}
    lines: list[str] = []
    with pytest.raises(GateError, match="a probability of one is off by inf"):
        parity._check_agreement(ParityReport(2, 0, 2, {"onnx": agreement}, {}), lines.append)
    assert lines[1].startswith("  inf  one")


def test_a_checkpoint_without_finite_logits_for_one_photo_fails_the_gate(tmp_path: Path) -> None:
    samples = write(tmp_path, *COLOURS)
    checkpoint = Means(lambda logits: np.where(logits[:, [1]] > logits[:, [0]], logits, np.nan))
    with pytest.raises(GateError, match=rf"a probability of {samples[0][0]} is off by inf"):
        parity.gate(checkpoint, PREPROCESS, {"onnx": Predictor(MANIFEST, Means())}, samples)


def test_a_tie_is_within_the_tolerance_of_the_checkpoint() -> None:
    agreement = Agreement()
    gaps = np.array([0.0, 0.99e-4, 1.01e-4])
    truth = np.stack([0.5 + gaps, np.full(3, 0.5), np.zeros(3)], axis=1)
    answers = truth.copy()
    answers[:, 1] += 2e-4
    parity._compare(agreement, truth, answers, ["equal", "near", "far"])
    assert (agreement.ties, agreement.changed) == ({"equal", "near"}, {"far"})


def test_five_percent_of_the_photos_may_be_unreadable(tmp_path: Path) -> None:
    samples = write(tmp_path, *[COLOURS[0]] * 20)
    samples[7][0].write_bytes(b"no photo")
    report = gate(samples, same)
    assert (report.photos, report.skipped, report.classes) == (19, 1, {0: (19, 19)})
    samples[3][0].unlink()
    with pytest.raises(DataError) as refused:
        gate(samples, same)
    assert str(refused.value) == (
        f"2 of 20 validation photos can't be decoded, for example {samples[3][0]}; replace them"
    )
    with pytest.raises(DataError) as refused:
        gate([], same)
    assert str(refused.value) == (
        "there are no validation photos to check the export on; use --data"
    )
    for path, _ in samples:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"^20 of 20 validation photos can't be decoded"):
        gate(samples, same)


def test_at_most_500_photos_are_drawn_evenly() -> None:
    samples = [(Path(str(n)), n) for n in range(2000)]
    drawn = [label for _, label in parity.subsample(samples)]
    assert len(set(drawn)) == 500 == parity.MAX_PHOTOS
    assert drawn == sorted(drawn)
    assert 100 < np.searchsorted(drawn, 1000) < 400
    assert parity.subsample(samples[:500]) == samples[:500]
    assert len(parity.subsample(samples[:501])) == 500


# ---- golden images


def golden(folder: Path, samples: Any) -> list[tuple[str, Path]]:
    """The file of each golden image, and the photo that has the same content."""
    payload = folder / "payload"
    payload.mkdir()
    by_content = {path.read_bytes(): path for path, _ in samples if path.is_file()}
    entries = parity.write_golden(payload, Means(), MANIFEST, samples)
    assert len(list((payload / "golden").iterdir())) == len(entries)
    return [
        (entry["file"], by_content[(payload / entry["file"]).read_bytes()]) for entry in entries
    ]


def test_golden_images_are_the_smallest_readable_photos_of_their_classes(tmp_path: Path) -> None:
    samples = [
        (tmp_path / name, label)
        for name, label in (("b.PNG", 1), ("a.png", 1), ("c.jpeg", 0), ("d.png", 0), ("e.png", 2))
    ]
    for (path, _), shade in zip(samples, (1, 2, 3, 4, 5), strict=True):
        path.write_bytes(png(shade, 0, 0))
    samples[2][0].write_bytes(png(3, 0, 0) + b"\0")  # larger than d.png
    samples += [(tmp_path / "gone.png", 2), (tmp_path / "empty.png", 2), (tmp_path / "dir", 0)]
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "dir").mkdir()
    assert golden(tmp_path, samples) == [
        ("golden/0.png", tmp_path / "d.png"),
        ("golden/1.png", tmp_path / "a.png"),  # of two of the same size, the first by name
        ("golden/2.png", tmp_path / "e.png"),
    ]


def test_golden_images_of_many_classes_are_spread_over_the_classes(tmp_path: Path) -> None:
    samples = []
    for label in range(20):
        path = tmp_path / f"{label}.png"
        path.write_bytes(png(label, 0, 0))
        samples.append((path, label))
    found = [path.stem for _, path in golden(tmp_path, samples[::-1])]
    assert found == [str(label) for label in (0, 2, 5, 7, 10, 12, 15, 17)]


def test_a_class_without_a_readable_photo_has_no_golden_image(tmp_path: Path) -> None:
    samples = write(tmp_path, *COLOURS)
    samples[1][0].write_bytes(b"the only one of its class")
    assert [file for file, _ in golden(tmp_path, samples)] == ["golden/0.png", "golden/1.png"]


def test_golden_images_are_on_the_background_and_within_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = write(tmp_path, (0, 0, 0, 0), (10, 220, 20), (90, 20, 130))
    (tmp_path / "all").mkdir()
    entries = parity.write_golden(tmp_path / "all", Means(), MANIFEST, samples)
    pixels = np.array(PREPROCESS.background, np.uint8).reshape(1, 1, 1, 3)
    expected = softmax(Means().run(pixels)[0], 2.0)[0]
    assert entries[0]["probabilities"]["fp32"] == pytest.approx(expected, abs=1e-12)
    sizes = [path.stat().st_size for path, _ in samples]
    for limit, count in ((sum(sizes), 3), (sum(sizes) - 1, 2), (1, 1)):
        monkeypatch.setattr(parity, "GOLDEN_BYTES", limit)
        folder = tmp_path / str(limit)
        folder.mkdir()
        assert len(parity.write_golden(folder, Means(), MANIFEST, samples)) == count


def test_golden_images_of_photos_with_odd_suffixes_have_none(tmp_path: Path) -> None:
    samples = [(tmp_path / name, n) for n, name in enumerate(("a.jpg?itok=\udcff", "b", "c.JPG"))]
    for number, (path, _) in enumerate(samples):
        path.write_bytes(png(number, 0, 0))
    assert [file for file, _ in golden(tmp_path, samples)] == [
        "golden/0",
        "golden/1",
        "golden/2.jpg",
    ]
