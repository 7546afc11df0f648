"""Runs with a small untrained classifier, and a cache of written ONNX files."""

import colorsys
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from export.writers import onnx
from serving.imaging import decode
from serving.imaging.preprocess import Preprocess
from tests.support.random_batchnorms import randomise_batchnorms, scale_logits
from training.config.sections import DataConfig
from training.data.dataset import SPLIT_FILE, load_dataset, write_split
from training.models.classifier import create_classifier, normalise
from training.run import checkpoint


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

    def __init__(self, folder, per_class=8):
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
        options = {"arch_args": {"width_mult": 0.25}, "head": {"hidden": 16}}
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


_WRITTEN = {}


@pytest.fixture
def cached_onnx_export(monkeypatch):
    """Reuse the exporter's output for equal weights and metadata, because it takes seconds."""

    def write(graph, path, **facts):
        digest = hashlib.sha256(repr(sorted(facts.items())).encode())
        for key, value in graph.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
        key = digest.digest()
        if key not in _WRITTEN:
            real(graph, path, **facts)
            _WRITTEN[key] = path.read_bytes()
        path.write_bytes(_WRITTEN[key])

    real = onnx.write
    monkeypatch.setattr(onnx, "write", write)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one torch thread, because more don't speed up small networks, and threads busy-wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
