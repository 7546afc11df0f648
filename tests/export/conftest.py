"""Runs with a small untrained classifier, and outputs of the exporters that all workers share."""

import colorsys
import hashlib
import io
import os
import pickle
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from onnx import ModelProto
from PIL import Image

from export import benchmark, pipeline
from export.precision import int8
from export.writers import onnx
from export.writers.formats import FORMATS
from serving.bundle import storage
from serving.bundle.manifest import Manifest
from serving.imaging import decode
from serving.imaging.preprocess import Preprocess
from serving.utils.files import lock
from tests.support.random_batchnorms import randomise_batchnorms, scale_logits
from training.config.sections import DataConfig
from training.data.dataset import SPLIT_FILE, load_dataset, write_split
from training.models.classifier import create_classifier, normalise
from training.run import checkpoint

SMALL = {"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 2], [2, 16, 1, 1]]}
"""Two blocks of a MobileNetV2, one with a shortcut: PyTorch's exporter is slow with all 17."""


def pixels(count, size, seed=0):
    """Photo-like images over the whole range of values: uint8 [count, size, size, 3].

    They vary in coarseness, brightness and hue.
    """
    rng = np.random.default_rng(seed)
    squares = []
    for index in range(count):
        cells = (2, 3, 5, 9)[index % 4]
        tint = np.array(colorsys.hsv_to_rgb(rng.random(), 0.9, 1)) ** rng.uniform(0, 2)
        grid = (rng.integers(0, 256, (cells, cells, 3)) * tint).astype(np.uint8)
        square = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
        squares.append(np.asarray(square))
    return torch.from_numpy(np.stack(squares))


def jpeg(hue, rng, size=(44, 40)):
    colour = np.array(colorsys.hsv_to_rgb(hue, 0.8, 0.8)) * 255
    noise = rng.normal(0, 40, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


class Run:
    """A run's folder with a small untrained classifier, and its photos."""

    classes = ("blue", "green", "red")

    def __init__(self, folder, per_class=14):
        self.folder = folder / "runs" / "tiny"
        self.photos = folder / "photos"
        self.folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number, name in enumerate(self.classes):
            (self.photos / name).mkdir(parents=True)
            for index in range(per_class):
                photo = jpeg(number / 3, rng, (44 + index, 40))
                (self.photos / name / f"{index}.jpg").write_bytes(photo)
        self.preprocess = Preprocess(size=32)
        self.dataset = load_dataset(str(self.photos), config=DataConfig(valid=0.5))
        torch.manual_seed(0)
        options = {"arch_args": SMALL, "head": {"hidden": 16}}
        self.classifier = create_classifier("mobilenet_v2", 3, **options)
        self.randomise()
        self.info = checkpoint.CheckpointInfo(
            name="tiny",
            arch="mobilenet_v2",
            classes=self.classes,
            preprocess=self.preprocess,
            seed=7,
            data={
                "source": str(self.photos),
                "root": str(self.photos),
                "fingerprint": self.dataset.fingerprint,
            },
            metrics={"accuracy": 0.5},
            versions=checkpoint.versions(),
            **options,
        )
        self.save()
        write_split(self.dataset, self.folder / SPLIT_FILE)

    def randomise(self, *, centred=True):
        """Randomise the network; its outputs depend on the photo. `centred`: as `scale_logits`."""
        squares = [self.preprocess(decode.read(s.path).image) for s in self.dataset.valid]
        x = normalise(torch.from_numpy(np.stack(squares)), self.preprocess)
        scale_logits(randomise_batchnorms(self.classifier, x), x, centred=centred)

    def save(self):
        checkpoint.save(self.folder / checkpoint.BEST, self.classifier, self.info)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """A run for tests that do not change it."""
    return Run(tmp_path_factory.mktemp("shared"))


class SharedFolder:
    """Files that the first worker that needs them makes, and the other workers read."""

    def __init__(self, folder):
        self.folder = folder
        self.folder.mkdir(exist_ok=True)

    @contextmanager
    def locked(self, name):
        with (self.folder / f"{name}.lock").open("w") as file:
            lock(file.fileno(), wait=True)
            yield self.folder / name

    def read(self, key, make):
        """The bytes that the first call of `make` for a hash of its arguments returned."""
        with self.locked(key.hexdigest()) as path:
            if not path.exists():
                path.write_bytes(make())
            return path.read_bytes()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    return SharedFolder(root / "export")


class Recorded:
    """Returns again what PyTorch's exporter and the search for int8 returned for equal arguments.

    Each takes seconds. What the export does with the results runs anew.
    """

    def __init__(self, files):
        self.files = files
        self.translate, self.search = onnx._translate, int8.search

    def patch(self, monkeypatch):
        monkeypatch.setattr(onnx, "_translate", self._translate)
        monkeypatch.setattr(int8, "search", self._search)

    def _translate(self, graph, preprocess):
        key = hashlib.sha256(repr((preprocess, graph, graph.core.code)).encode())
        for name, value in graph.state_dict().items():
            key.update(name.encode() + value.numpy().tobytes())
        made = self.files.read(
            key, lambda: self.translate(graph, preprocess).SerializeToString(deterministic=True)
        )
        return ModelProto.FromString(made)

    def _search(self, source, pixels, min_agreement):
        key = hashlib.sha256(repr((pixels.shape, min_agreement)).encode())
        key.update(source.read_bytes() + pixels.tobytes())
        return pickle.loads(
            self.files.read(key, lambda: pickle.dumps(self.search(source, pixels, min_agreement)))
        )


@pytest.fixture(scope="session")
def recorded(shared_folder):
    return Recorded(shared_folder)


@pytest.fixture
def recorded_exporters(recorded, monkeypatch):
    """The test reuses outputs of the exporters; see `Recorded`."""
    recorded.patch(monkeypatch)


def rates(graphs, preprocess, photos=(), device="cpu", *, sizes=None):
    """Rates in place of measured ones, which differ from run to run; int8 is twice as fast."""
    settings = [
        benchmark.ThreadSetting(1, 1, 1),
        benchmark.ThreadSetting(1, 1, 8),
        benchmark.ThreadSetting(1, 2, 1),
    ]
    return {
        name: {setting: 100.0 * (1 + (name != "fp32")) + setting.batch for setting in settings}
        for name in graphs
    }


def export(run, out, *, log=lambda line: None, data=None, formats=(), **options):
    """Export in fp32, and as ONNX alone, unless the arguments say otherwise."""
    export_options = pipeline.ExportOptions(**{"precision": "fp32"} | options)
    return pipeline.export(run.folder, out, export_options, data=data, formats=formats, log=log)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Exported(NamedTuple):
    """An exported bundle."""

    out: Path
    manifest: Manifest
    lines: list[str]


def export_once(shared_folder, recorded, run, name, **options):
    """The first worker exports; all read the same bundle, so tests must not change it."""
    with shared_folder.locked(name) as out, pytest.MonkeyPatch.context() as patch:
        log = out.with_suffix(".txt")
        if not log.exists():
            patch.setattr(benchmark, "measure", rates)
            recorded.patch(patch)
            lines = []
            export(run, out, log=lines.append, **options)
            log.write_text("\n".join(lines))
    return Exported(out, storage.read(out).manifest, log.read_text().splitlines())


@pytest.fixture(scope="session")
def exported(shared_folder, recorded, shared_run):
    """A bundle of `shared_run` in fp32 with ONNX alone."""
    return export_once(shared_folder, recorded, shared_run, "onnx")


@pytest.fixture(scope="session")
def exported_in_all_formats(shared_folder, recorded, shared_run):
    """A bundle of `shared_run` in fp32."""
    return export_once(shared_folder, recorded, shared_run, "all", formats=FORMATS)


@pytest.fixture(scope="session")
def exported_with_int8(shared_folder, recorded, shared_run):
    """A bundle of `shared_run` with ONNX alone, in fp32 and int8: nearly any drop is accepted."""
    options = {"precision": "auto", "accuracy_budget": 90}
    return export_once(shared_folder, recorded, shared_run, "int8", **options)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one torch thread, because more don't speed up small networks, and threads busy-wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
