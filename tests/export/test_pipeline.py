"""Export pipeline: a published bundle was checked, and a failed export changes nothing."""

import dataclasses
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from export import benchmark, calibration, model_card, parity, pipeline, publish
from export.writers.formats import FORMATS, TORCHSCRIPT
from serving.bundle import storage
from serving.errors import BundleError, DataError, GateError, OptionError, WorkError
from serving.inference.load import open_predictor, verify
from tests.export.conftest import contents, export, rates
from training.models.classifier import normalise

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/manifest.schema.json").read_text())


@pytest.fixture(autouse=True)
def same_speed(monkeypatch):
    monkeypatch.setattr(benchmark, "measure", rates)


@pytest.fixture
def out(exported, tmp_path, recorded_exporters):
    """A copy of the bundle of `exported`, which the test may change."""
    return shutil.copytree(exported[0], tmp_path / "bundle")


def test_the_bundle_reads_back_and_answers_as_the_checkpoint(exported, shared_run):
    out, manifest, _ = exported
    assert storage.read(out).manifest == manifest
    predictor = open_predictor(out, device="cpu")
    samples = shared_run.dataset.valid
    prepared = [predictor.prepare(sample.path.read_bytes()) for sample in samples]
    answers = np.stack([answer.probabilities for answer in predictor.predict(prepared)])
    pixels = torch.from_numpy(np.concatenate([item.pixels for item in prepared]))
    with torch.no_grad():
        logits = shared_run.classifier(normalise(pixels, shared_run.preprocess))
    expected = (logits.double() / manifest.temperature).softmax(1).numpy()
    assert np.abs(answers - expected).max() <= 1e-4
    right = answers.argmax(1) == [sample.label for sample in samples]
    assert manifest.precisions["fp32"]["accuracy"] == right.mean()


def test_the_manifest_describes_the_export(exported_in_all_formats, shared_run):
    out, manifest, lines = exported_in_all_formats
    assert (manifest.name, manifest.arch) == ("tiny", "mobilenet_v2")
    assert manifest.labels == shared_run.classes
    assert manifest.parity["photos"] == len(shared_run.dataset.valid)
    assert set(manifest.parity["graphs"]) == {"onnx", "torchscript", "torch.export"}
    jsonschema.validate(json.loads((out / "manifest.json").read_text()), SCHEMA)
    assert manifest.batchnorm == {"before": 9, "folded": 9, "left": {}}
    assert manifest.tuning["cpu"]["max_batch"] == 1
    for name in ("fp16", "int8"):
        assert manifest.tried[name] == {"kept": False, "why_not": "not tried: --precision fp32"}
    assert manifest.thresholds["confident"] is None
    assert manifest.calibration["temperature"] == manifest.temperature != 1
    assert [row["views"] for row in manifest.tta["views"]] == [*range(2, len(manifest.views) + 1)]
    for words in ("calibrated on 21 held-out photos: temperature", "views: "):
        assert any(line.startswith(words) for line in lines)
    assert len(manifest.golden) == 3
    assert manifest.provenance["seed"] == 7
    assert manifest.provenance["data"]["fingerprint"] == shared_run.dataset.fingerprint
    # No absolute paths and no host name.
    for path in (out / "manifest.json", out / manifest.version / "README.md"):
        text = path.read_text()
        assert str(shared_run.photos.parent) not in text
        assert os.uname().nodename not in text
    assert any("9 of 9" in line for line in lines)
    assert manifest.version in lines[-1]


def test_the_model_card_describes_this_model(exported):
    out, manifest, _ = exported
    card = (out / manifest.version / "README.md").read_text()
    for word in ("# tiny", "blue, green, red", manifest.version, "uint8 `[batch, 32, 32, 3]`"):
        assert word in card


@pytest.mark.parametrize("decode", ["full", "scaled"])
@pytest.mark.parametrize(
    ("fit", "words"),
    [
        ("crop", "cut the centre square of 0.875 of the short side, resize it to 32 x 32"),
        ("squish", "resize it, whole and whatever its shape, to 32 x 32"),
        ("pad", "in the middle of a square of the colour RGB (1, 2, 3), resize that to 32 x 32"),
    ],
)
def test_the_model_card_says_how_photos_become_squares(exported, fit, words, decode):
    _, manifest, _ = exported
    fields = {"fit": fit, "decode": decode, "background": (1, 2, 3), "crop": 0.875}
    preprocess = dataclasses.replace(manifest.preprocess, **fields)
    card = model_card.card(manifest.model_copy(update={"preprocess": preprocess}))
    one_line = " ".join(card.split())
    assert f"{words} (bilinear, antialiased)" in one_line
    assert ("a part of at least 64 pixels a side)" in one_line) == (decode == "scaled")


def test_the_model_card_has_the_accuracy_of_each_class(exported, shared_run):
    out, manifest, _ = exported
    predictor = open_predictor(out, device="cpu")
    expected = {name: [0, 0] for name in manifest.labels}
    for sample in shared_run.dataset.valid:
        answer = predictor.predict([predictor.prepare(sample.path.read_bytes())])[0]
        counts = expected[manifest.labels[sample.label]]
        counts[0] += 1
        counts[1] += int(answer.probabilities.argmax()) == sample.label
    card = (out / manifest.version / "README.md").read_text()
    table = card.partition("| class | held-out")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {row[0]: [int(row[1]), int(row[2])] for row in rows} == expected
    shares = [int(row[3].rstrip("%")) for row in rows]
    assert shares == sorted(shares)
    balanced = np.mean([right / photos for photos, right in expected.values()])
    assert f"the mean of their accuracies, the fp32 graph reaches\n{balanced:.1%}." in card


def test_the_model_card_warns_of_classes_that_are_never_found(exported):
    _, manifest, _ = exported
    rows = [
        {"class": 0, "photos": 30, "right": 30},
        {"class": 1, "photos": 3, "right": 1},
        {"class": 2, "photos": 2, "right": 0},
    ]
    parity = {**manifest.parity, "classes": rows}
    card = model_card.card(manifest.model_copy(update={"parity": parity}))
    assert "**Warning**: accuracy 88.57% is at the level of always saying blue, 85.71%" in card
    assert "**Warning**: 1 class is never found: red (0 of 2)." in card
    good = [{"class": i, "photos": 9, "right": 9} for i in range(3)]
    parity = {**manifest.parity, "classes": good}
    assert "**Warning**" not in model_card.card(manifest.model_copy(update={"parity": parity}))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # deprecated
def test_the_torchscript_graph_is_served_on_request(exported_in_all_formats, tmp_path, shared_run):
    exported, manifest, _ = exported_in_all_formats
    onnx = open_predictor(exported, device="cpu")
    script = open_predictor(exported, device="cpu", kind="torchscript")
    assert (script.runtime.provider, script.precision) == ("torchscript-cpu", "fp32")
    assert script.cap == 1
    sample = shared_run.dataset.valid[0].path.read_bytes()
    answers = [one.predict([one.prepare(sample)])[0].probabilities for one in (onnx, script)]
    assert np.abs(answers[0] - answers[1]).max() <= 1e-4
    with pytest.raises(OptionError, match="TorchScript runs on cpu or cuda"):
        open_predictor(exported, device="tensorrt", kind="torchscript")
    out = shutil.copytree(exported, tmp_path / "bundle")
    (out / manifest.version / "model.ts").write_bytes(b"code")
    with pytest.raises(BundleError, match=r"model\.ts was changed"):
        open_predictor(out, device="cpu", kind="torchscript")


def test_the_confidence_threshold_reaches_its_target(
    shared_run, exported, tmp_path, recorded_exporters
):
    target = calibration.ConfidenceTarget.parse("coverage=0.5")
    lines = []
    out = tmp_path / "bundle"
    manifest = export(shared_run, out, confident=target, log=lines.append)
    assert manifest.version != exported[1].version
    chosen = manifest.calibration["confident"]
    assert chosen["threshold"] == manifest.thresholds["confident"]
    assert any(line.startswith("confident from probability 0.") for line in lines)
    assert "is called confident from" in (out / manifest.version / "README.md").read_text()
    predictor = open_predictor(out, device="cpu")
    photos = [predictor.prepare(s.path.read_bytes()) for s in shared_run.dataset.valid]
    answers = [predictor.answer(answer)["confident"] for answer in predictor.predict(photos)]
    assert sum(answers) == chosen["coverage"] * len(photos) == 11  # of 21


def test_golden_images_are_verified_without_the_checkpoint(exported):
    *_, line = verify(exported[0])
    assert "3 golden images" in line


def test_exporting_twice_gives_the_same_version_and_the_same_bytes(
    exported_in_all_formats, shared_run, tmp_path, recorded_exporters
):
    out, manifest, _ = exported_in_all_formats
    assert export(shared_run, tmp_path / "other", formats=FORMATS) == manifest
    assert contents(tmp_path / "other") == contents(out)


@pytest.mark.process
def test_a_whole_export_twice_gives_the_same_version_and_the_same_bytes(shared_run, tmp_path):
    """With the search for int8, and nothing that another test has recorded."""
    options = {"precision": "auto", "accuracy_budget": 90, "formats": FORMATS}
    first, second = (export(shared_run, tmp_path / name, **options) for name in "ab")
    assert first == second
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {"model.onnx", "model.int8.onnx", "model.ts", "model.pt2"} < first.files.keys()


def test_a_format_that_is_not_asked_for_is_not_written(exported):
    out, manifest, _ = exported
    assert (manifest.torchscript, manifest.torch_export) == (None, None)
    assert set(manifest.parity["graphs"]) == {"onnx"}
    assert not [name for name in contents(out) if name.endswith((".ts", ".pt2"))]


def test_the_same_version_again_keeps_its_payload(shared_run, exported, out):
    graph = out / exported[1].version / "model.onnx"
    before = graph.stat().st_ino
    assert export(shared_run, out) == exported[1]
    assert graph.stat().st_ino == before
    storage.read(out)


def test_a_damaged_bundle_is_replaced(shared_run, exported, out):
    (out / exported[1].version / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError):
        storage.read(out)
    export(shared_run, out)
    assert contents(out) == contents(exported[0])


def other_version(run, out, coverage):
    """A version with the same graph and a threshold."""
    target = calibration.ConfidenceTarget.parse(f"coverage={coverage}")
    return export(run, out, confident=target)


def test_an_export_deletes_all_versions_but_the_last_two(shared_run, exported, out):
    versions = [exported[1].version]
    for coverage in (0.3, 0.6):
        versions.append(other_version(shared_run, out, coverage).version)
        storage.read(out)
        folders = {path.name for path in out.iterdir() if path.is_dir()}
        assert folders == set(versions[-2:])
    assert len(set(versions)) == 3


def test_concurrent_exports_are_published_one_after_the_other(
    shared_run, out, tmp_path, monkeypatch
):
    made = []
    for coverage in (0.3, 0.6):
        manifest = other_version(shared_run, tmp_path / f"{coverage}", coverage)
        made.append((tmp_path / f"{coverage}" / manifest.version, manifest))
    publish_manifest, started, other = storage.publish, threading.Event(), []

    def meanwhile(*args):
        """Start the second export before the first one's manifest is written."""
        if not started.is_set():
            started.set()
            other.append(threading.Thread(target=publish.publish, args=(*made[1], out)))
            other[0].start()
            other[0].join(1)  # without the lock it would have finished
        publish_manifest(*args)

    monkeypatch.setattr(storage, "publish", meanwhile)
    publish.publish(*made[0], out)
    other[0].join()
    assert storage.read(out).manifest.version == made[1][1].version
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {manifest.version for _, manifest in made}


def with_wrong_weight(write):
    """A writer that first changes one weight of the fused graph."""

    def wrapper(graph, path, **facts):
        with torch.no_grad():
            last = [m for m in graph.modules() if isinstance(m, torch.nn.Linear)][-1]
            last.bias[0] += 0.01
        write(graph, path, **facts)

    return wrapper


def test_a_wrong_graph_fails_the_parity_gate(shared_run, exported, out, tmp_path):
    wrong = [TORCHSCRIPT._replace(write=with_wrong_weight(TORCHSCRIPT.write))]
    before = contents(out)
    with pytest.raises(GateError, match=r"torchscript .*\.jpg is off by 0\.0"):
        export(shared_run, out, formats=wrong)
    assert contents(out) == before
    assert {path.name for path in out.iterdir()} == {path.name for path in exported[0].iterdir()}
    with pytest.raises(GateError):
        export(shared_run, tmp_path / "new", formats=wrong)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_the_old_bundle_unchanged(
    shared_run, exported, out, monkeypatch, error
):
    def fail(*_, **__):
        raise error

    before = contents(out)
    monkeypatch.setattr(pipeline.onnx, "write", fail)
    with pytest.raises((WorkError, KeyboardInterrupt)) as caught:
        export(shared_run, out)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert contents(out) == before
    assert not list(out.glob(".partial*"))


def test_partial_folders_of_dead_exports_are_deleted_and_of_running_ones_kept(shared_run, out):
    done = subprocess.Popen(["true"])
    done.wait()
    dead, running = out / f".partial-{done.pid}", out / f".partial-{os.getppid()}"
    for folder in (dead, running):
        folder.mkdir()
    export(shared_run, out)
    assert not dead.exists()
    assert running.exists()


def test_weights_that_are_not_finite_are_named(run, tmp_path):
    with torch.no_grad():
        run.classifier.head[-1].weight[0, 0] = float("nan")
    run.save()
    with pytest.raises(WorkError, match=r"head\.6\.weight holds NaN"):
        export(run, tmp_path / "bundle")


def test_unusable_arguments_are_one_line_and_write_nothing(run, tmp_path, recorded_exporters):
    out = tmp_path / "bundle"
    with pytest.raises(DataError, match="fledge train"):
        pipeline.export(tmp_path / "nothing", out)
    with pytest.raises(OptionError, match="--precision fp16: no usable GPU"):
        export(run, out, precision="fp16")
    with pytest.raises(OptionError, match="name = 'a/b'"):
        export(run, out, name="a/b")
    moved = run.photos.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="--data"):
        export(run, out)
    assert not out.exists()
    assert export(run, out, data=moved).parity["photos"] == len(run.dataset.valid)


def test_an_output_that_is_no_bundle_is_refused(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(OptionError, match="is a file"):
        export(run, file)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"of": "something else"}))
    with pytest.raises(OptionError, match=r"no bundle and holds manifest\.json"):
        export(run, folder)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_an_unreadable_photo_is_skipped(run, tmp_path, monkeypatch, recorded_exporters):
    monkeypatch.setattr(parity, "MAX_UNREADABLE_SHARE", 0.5)
    run.dataset.valid[0].path.write_bytes(b"no photo")
    manifest = export(run, tmp_path / "bundle")
    assert manifest.parity["skipped"] == 1
    assert manifest.parity["photos"] == len(run.dataset.valid) - 1


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key.pem"
    command = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def test_a_signed_export_replaces_files_changed_since_the_last_export(
    shared_run, exported, out, key
):
    manifest = storage.read(out).manifest
    card = out / manifest.version / "README.md"
    original = card.read_bytes()
    card.write_text("# Forged")
    files = storage.describe_files(out / manifest.version)
    storage.publish(manifest.model_copy(update={"files": files}), out)
    export(shared_run, out, sign=key)
    assert card.read_bytes() == original
    assert storage.read(out).signers


def test_a_live_version_without_a_trusted_signature_is_not_rewritten(
    shared_run, exported, out, key, monkeypatch
):
    public = key.with_suffix(".pub")
    command = ["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)]
    subprocess.run(command, check=True, capture_output=True)
    graph = out / exported[1].version / "model.onnx"
    before = graph.stat().st_ino
    monkeypatch.setenv("FLEDGE_TRUSTED_KEYS", str(public))  # the live version is not signed
    with pytest.raises(BundleError):
        storage.read(out)
    export(shared_run, out, sign=key)
    assert graph.stat().st_ino == before
    assert len(storage.read(out).signers) == 1
