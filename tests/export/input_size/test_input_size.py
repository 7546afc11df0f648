"""`fledge export RUN --size N` and `--sizes N,N`: other input sizes than that of the training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

import fledge
from export import benchmark, calibration, pipeline
from export.graph import CheckpointRuntime
from export.input_size import choose, table
from export.input_size.compare import SizeComparison, SizeResult
from export.precision.loss_bounds import PairedDrop
from export.sources import source
from serving.bundle.inspect import describe
from serving.errors import DataError, GateError, OptionError, WorkError
from serving.imaging import decode
from serving.imaging.preprocess import Preprocess
from serving.inference.load import verify
from tests.export.conftest import Run, contents, rates
from tests.export.precision.test_folds import other_fold
from training.run import checkpoint

SCHEMA = json.loads((Path(__file__).parents[3] / "docs/manifest.schema.json").read_text())
TRAINED, KEPT, REFUSED = 32, 40, 64


@pytest.fixture(autouse=True)
def same_speed(monkeypatch: pytest.MonkeyPatch, recorded_exporters: None) -> None:
    monkeypatch.setattr(benchmark, "measure", rates)


@pytest.fixture(scope="module")
def sized_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is right for most photos at 32 and 40 pixels, and for few at 64."""
    run = Run(tmp_path_factory.mktemp("sized"))
    last = run.classifier.head[-1]
    with torch.no_grad():
        for parameter in (last.weight, last.bias):
            parameter.copy_(parameter[[0, 2, 1]])
    run.save()
    return run


def logits_of(run: Run, preprocess: Preprocess) -> np.ndarray:
    """The checkpoint's logits for the held-out photos, float32 [N, classes]."""
    decoded = [decode.read(s.path, preprocess=preprocess) for s in run.dataset.valid]
    pixels = np.stack([preprocess(one.image, one.area) for one in decoded])
    return CheckpointRuntime(run.classifier, preprocess).run(pixels)[0]


def right_at(run: Run, size: int) -> np.ndarray:
    """Which held-out photos the checkpoint itself classifies correctly at a size."""
    preprocess = replace(run.preprocess, size=size)
    samples = run.dataset.valid
    logits = logits_of(run, preprocess)
    return logits.argmax(axis=1) == [sample.label for sample in samples]


@pytest.mark.process
def test_a_bundle_of_another_size_has_all_figures_at_that_size(sized_run: Run, tmp_path: Path):
    lines: list[str] = []
    out = tmp_path / "bundle"
    manifest = pipeline.export(
        sized_run.folder,
        out,
        pipeline.ExportOptions(precision="fp32"),
        size=KEPT,
        formats=(),
        log=lines.append,
    )
    assert manifest.preprocess == replace(sized_run.preprocess, size=KEPT)
    assert manifest.graph["input"]["shape"] == ["batch", KEPT, KEPT, 3]
    verify(out, device="cpu")
    jsonschema.validate(json.loads((out / "manifest.json").read_text()), SCHEMA)

    here, before = right_at(sized_run, KEPT), right_at(sized_run, TRAINED)
    assert manifest.precisions["fp32"]["accuracy"] == here.mean()
    found = manifest.parity["size"]
    assert (found["trained_size"], found["photos"]) == (TRAINED, 21)
    assert (found["trained"]["size"], found["exported"]["size"]) == (TRAINED, KEPT)
    assert found["trained"]["accuracy"] == before.mean()
    assert found["exported"]["accuracy"] == here.mean()
    lost, won = (before & ~here).sum(), (here & ~before).sum()
    assert lost + won  # else the sizes could not be told apart
    assert found["exported"]["fell_points"] == pytest.approx(100 * (lost - won) / 21, abs=1e-3)
    assert found["exported"]["kept"]
    assert not found["exported"]["sure"]

    samples = [(sample.path, sample.label) for sample in sized_run.dataset.valid]
    logits = logits_of(sized_run, manifest.preprocess)
    held_out = calibration.HeldOut(logits[:, None], np.array([label for _, label in samples]))
    assert manifest.temperature == calibration.fit_temperature(logits, held_out.labels)
    assert manifest.thresholds["energy"] == pytest.approx(
        calibration.energy_threshold(held_out), rel=1e-3
    )

    (line,) = (line for line in lines if line.startswith(f"size {KEPT}"))
    assert f"size {KEPT} kept, as --size {KEPT} asks, though accuracy may fall by up to" in line
    assert (
        f"on 21 held-out photos {here.mean():.2%}, at the trained size 32 {before.mean():.2%}"
        in line
    )
    card = (out / manifest.version / "README.md").read_text()
    assert f"trained at 32 x 32 pixels and is exported at\n{KEPT} x {KEPT}" in card
    assert f"the accuracy is {here.mean():.2%} at {KEPT} and\n{before.mean():.2%} at 32" in card
    assert f"uint8\n`[batch, {KEPT}" in card or f"uint8 `[batch, {KEPT}" in card
    text = "\n".join(describe(out))
    assert f"{KEPT} x {KEPT} pixels" in text
    assert f"accuracy {before.mean():.1%} at the trained size, 32 pixels" in text


@pytest.mark.process
def test_a_size_that_surely_costs_too_much_is_refused_and_the_old_bundle_stays(
    sized_run: Run, exported, tmp_path: Path
):
    here, before = right_at(sized_run, REFUSED), right_at(sized_run, TRAINED)
    assert (before & ~here).sum() >= 6
    out = tmp_path / "bundle"
    lines: list[str] = []
    options = pipeline.ExportOptions(precision="fp32")
    with pytest.raises(
        GateError, match=r"--size 64 is refused: accuracy falls by .* budget is 0\.5"
    ):
        pipeline.export(sized_run.folder, out, options, size=REFUSED, formats=(), log=lines.append)
    assert not out.exists()
    assert any(line.startswith("size 64 refused: accuracy falls by") for line in lines)
    # A budget that it is within keeps it.
    most = replace(options, accuracy_budget=100)
    manifest = pipeline.export(
        sized_run.folder, out, most, size=REFUSED, formats=(), log=lambda line: None
    )
    assert manifest.preprocess.size == REFUSED
    assert manifest.parity["size"]["exported"]["sure"]
    before_failure = contents(out)
    with pytest.raises(GateError):
        pipeline.export(sized_run.folder, out, options, size=REFUSED, log=lambda line: None)
    assert contents(out) == before_failure


def test_the_trained_size_by_name_gives_the_same_bundle(shared_run: Run, exported, tmp_path: Path):
    manifest = pipeline.export(
        shared_run.folder,
        tmp_path / "bundle",
        pipeline.ExportOptions(precision="fp32"),
        size=TRAINED,
        formats=(),
        log=lambda line: None,
    )
    assert manifest.version == exported.manifest.version
    assert manifest.parity == exported.manifest.parity


@pytest.mark.process
def test_the_table_has_a_row_for_every_size_and_ends_with_the_command(
    sized_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["export", str(sized_run.folder), "--sizes", "64,40", "--json", "sizes.json"]
    assert fledge.main([*words, "--accuracy-budget", "1.5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    head, *rows = printed[:4]
    assert head.split()[:3] == ["size", "accuracy", "change"]
    assert [row.split()[0] for row in rows] == ["32", "40", "64"]
    assert [row.split()[1] for row in rows] == [
        f"{right_at(sized_run, size).mean():.2%}" for size in (32, 40, 64)
    ]
    assert rows[0].endswith("trained size")
    assert "may fall by up to" in rows[1]
    assert "refused: falls by at least" in rows[2]
    assert any("no other size is surely better" in line for line in printed)
    next_, command = printed[-1].split(": ", 1)
    assert next_ == "next"
    assert shlex.split(command) == [
        *("fledge", "export", str(sized_run.folder)),
        *("--accuracy-budget", "1.5"),
    ]
    figures = json.loads(Path("sizes.json").read_text())
    assert (figures["trained_size"], figures["advised"], figures["photos"]) == (32, 32, 21)
    assert [row["size"] for row in figures["sizes"]] == [32, 40, 64]
    assert [row["kept"] for row in figures["sizes"]] == [True, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.json"]  # no bundle


def test_sizes_are_compared_on_the_held_out_photos_of_all_folds(sized_run: Run, tmp_path: Path):
    lines: list[str] = []
    other = other_fold(sized_run, tmp_path / "other fold")
    found = choose.compare_sizes(sized_run.folder, [KEPT], folds=[other], log=lines.append)
    assert (found.photos, found.folds) == (42, 21)
    assert "on 42 held-out photos, 21 of them of other folds" in table.summary(found, KEPT)
    assert found.trained == TRAINED
    own = choose.compare_sizes(sized_run.folder, [KEPT], log=lines.append)
    assert own.at(KEPT).accuracy == right_at(sized_run, KEPT).mean()


@pytest.mark.process
def test_int8_is_judged_at_the_exported_size_on_all_folds(sized_run: Run, tmp_path: Path):
    out = tmp_path / "bundle"
    manifest = pipeline.export(
        sized_run.folder,
        out,
        pipeline.ExportOptions(precision="auto", accuracy_budget=90),
        folds=[other_fold(sized_run, tmp_path / "other fold")],
        size=KEPT,
        formats=(),
        log=lambda line: None,
    )
    assert manifest.tried["int8"]["photos"] == manifest.parity["size"]["photos"] == 42
    assert manifest.preprocess.size == KEPT
    assert set(manifest.precisions) == {"fp32", "int8"}
    assert any(line.startswith("int8 on CPU") for line in verify(out, device="cpu"))


def test_photos_that_cannot_be_decoded_are_counted(run: Run):
    run.dataset.valid[0].path.write_bytes(b"no photo")
    found = choose.compare_sizes(run.folder, [KEPT], log=lambda line: None)
    assert (found.photos, found.skipped) == (20, 1)
    assert any("20 held-out photos (1 more can't be decoded)" in x for x in table.lines(found))
    for sample in run.dataset.valid:
        sample.path.write_bytes(b"no photo")
    with pytest.raises(DataError, match="there are no held-out photos to compare sizes on"):
        choose.compare_sizes(run.folder, [KEPT], log=lambda line: None)


# ---- which size is advised


def result(size: int, lost: int, won: int, photos: int) -> SizeResult:
    drop = PairedDrop.of(lost, won, photos) if lost or won else PairedDrop(0, (0, 0), 0, 0)
    accuracy = 0.9 - (lost - won) / photos
    single = 1e6 / size**2
    return SizeResult(size, accuracy, 0.2, drop, single, 2 * single, 8, (224 / size) ** 2)


def comparison(photos: int, *sizes: tuple[int, int, int], budget: float = 0.5) -> SizeComparison:
    """A comparison with 224, from (size, photos lost, photos won)."""
    results = [result(224, 0, 0, photos), *(result(*one, photos) for one in sizes)]
    ordered = tuple(sorted(results, key=lambda one: one.size))
    return SizeComparison(224, ordered, photos, 0, budget)


@pytest.mark.parametrize(
    ("sizes", "photos", "advised", "words"),
    [
        ([(192, 9, 9), (256, 9, 9)], 200, 224, "no other size is surely better"),
        ([(160, 90, 10), (192, 2, 2), (256, 2, 2)], 5000, 192, "192 is the smallest of the sizes"),
        ([(192, 2, 2), (256, 5, 60), (288, 5, 40)], 5000, 256, "256 is the most accurate of"),
    ],
)
def test_the_advised_size_is_one_that_the_photos_speak_for(
    sizes: Sequence[tuple[int, int, int]], photos: int, advised: int, words: str
):
    found = comparison(photos, *sizes)
    assert found.advised.size == advised
    assert any(words in line for line in table.lines(found))
    assert found.to_dict()["trained_size"] == 224


def test_the_change_of_the_table_is_the_drop_with_the_other_sign():
    lines = list(table.lines(comparison(1000, (160, 30, 10), (256, 5, 45))))
    assert [line.split()[0] for line in lines[:4]] == ["size", "160", "224", "256"]
    assert "-2.00 (-3.2" in lines[1]
    assert "to -0.7" in lines[1]
    assert lines[1].endswith("refused: falls by at least 0.88")
    assert "+4.00 (+2.6" in lines[3]
    assert lines[3].endswith("surely more accurate")
    assert "1.96" in lines[1]  # (224 / 160) ** 2 times as fast
    ends = {len(line.partition("%")[0]) for line in lines[1:4]}
    assert len(ends) == 1, "columns are aligned"


def test_the_command_names_what_was_named():
    command = table.command(
        Path("runs/my run"),
        192,
        data=Path("-photos"),
        photos=Path("more"),
        folds=[Path("runs/1"), Path("runs/2")],
        budget=2,
    )
    assert shlex.split(command) == [
        *("fledge", "export", "runs/my run", "--data", "./-photos", "--photos", "more"),
        *("--folds", "runs/1", "runs/2", "--size", "192", "--accuracy-budget", "2"),
    ]


# ---- mistakes


def test_sizes_are_whole_numbers_with_commas():
    assert table.parse("224, 160,224") == [160, 224]
    for text in ("160;192", "", "160,,192", "192.5", "-3", "²"):
        with pytest.raises(OptionError, match="write pixels with commas, such as 160,192,224"):
            table.parse(text)
    with pytest.raises(OptionError, match=r"^--sizes '': write pixels"):
        table.parse("")
    for text in ("10000", "160,99999", "9" * 5000):
        with pytest.raises(OptionError, match=r"^--sizes \d{5,12}: use 8 to 4096 pixels$"):
            table.parse(text)
    with pytest.raises(OptionError, match="9 sizes are too many; name up to 8"):
        table.parse(",".join(str(size) for size in range(100, 109)))


def test_sizes_that_a_network_does_not_take_are_told_before_the_photos_are_read(
    run: Run, tmp_path: Path
):
    run.photos.rename(tmp_path / "moved")
    for size, words in (
        (5, "--size 5: use 8 to 4096 pixels"),
        (5000, "--size 5000: use 8 to 4096 pixels"),
    ):
        with pytest.raises(OptionError, match=words):
            pipeline.export(run.folder, tmp_path / "bundle", size=size)
    with pytest.raises(OptionError, match="--sizes 7: use 8 to 4096"):
        choose.compare_sizes(run.folder, [32, 7])
    with pytest.raises(DataError, match="--data"):
        choose.compare_sizes(run.folder, [48])


@pytest.mark.parametrize(
    ("arch", "args", "size", "words"),
    [
        ("vit_b_16", {}, 256, r"--size 256: the weights of vit_b_16 are for 224 pixels alone"),
        ("maxvit_t", {}, 448, r"train again with another arch_args\.input_size"),
        ("densenet121", {}, 16, r"--size = 16 does not fit densenet121: use \d+ or more"),
    ],
)
def test_networks_with_limits_of_size_name_them(arch: str, args: dict, size: int, words: str):
    info = checkpoint.CheckpointInfo(
        name="x", arch=arch, classes=("a", "b"), preprocess=Preprocess(), arch_args=args
    )
    with pytest.raises(OptionError, match=words):
        source.with_size(info, size)
    assert source.with_size(info, 224) == Preprocess()


def test_another_size_leaves_the_rest_of_the_preprocessing():
    own = Preprocess(crop=0.9, interpolation="bicubic", decode="scaled", fit="pad")
    info = checkpoint.CheckpointInfo(name="x", arch="resnet18", classes=("a",), preprocess=own)
    assert source.with_size(info, 288) == replace(own, size=288)


def test_options_that_do_not_go_together_are_one_line(
    shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = str(shared_run.folder)
    for words, reason in (
        ([run, "--sizes", "32,40", "--out", "b"], "--out goes with an export; --sizes writes no"),
        ([run, "--sizes", "32", "--size", "40"], "--size goes with an export"),
        ([run, "--sizes", "32", "--precision", "int8"], "--precision goes with an export"),
        ([run, "--sizes", "32", "--register"], "--register goes with an export"),
        ([run, "--sizes", "32", "--checkpoint", "f"], "--checkpoint goes with an export"),
        (["--sizes", "32"], "--sizes goes with a run"),
        ([run, "--sizes", "32", "--json", str(tmp_path)], "a folder; name a file"),
        ([run, "--sizes", "32", "--accuracy-budget", "101"], "use points of accuracy, 0 to 100"),
        ([run, "--json", "f"], "--json goes with --sizes"),
        ([run, "--crop", "0.5"], "--crop goes with --checkpoint FILE, not with a run"),
    ):
        assert fledge.main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.splitlines()) == 1


def test_the_option_size_reaches_the_export_of_a_run(
    shared_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    given: dict[str, object] = {}
    monkeypatch.setattr(pipeline, "export", lambda *args, **options: given.update(options))
    assert fledge.main(["export", str(shared_run.folder), "--size", "40"]) == 0
    assert given["size"] == 40


def test_weights_that_are_not_finite_are_told_before_sizes_are_compared(run: Run):
    with torch.no_grad():
        run.classifier.head[-1].weight[0, 0] = float("inf")
    run.save()
    with pytest.raises(WorkError, match="holds NaN or infinity"):
        choose.compare_sizes(run.folder, [40])
