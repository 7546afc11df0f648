import colorsys
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from export import onnx
from serving import images
from serving.preprocess import Preprocess
from training import checkpoint, data, model
from training.sections import DataConfig


def lively(network, x=None, seed=0):
    """Give a network BatchNorms that do something: a fresh one's are the identity.

    Gains have both signs, variances are drawn from 0.5 to 2. Drawn so, a deep network soon says
    nearly the same to every input. With `x`, means and variances are therefore what each layer sees
    for `x`, moved by up to half a standard deviation and by a factor of 0.5 to 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) * (high - low) + low

    network.eval()
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.copy_(uniform(norm.running_mean, -1, 1))
            norm.running_var.copy_(uniform(norm.running_var, 0.5, 2))
            norm.momentum = 1.0  # the statistics of one very batch
            if norm.affine:
                sign = uniform(norm.weight, -1, 3).sign()  # a quarter is negative
                norm.weight.copy_(uniform(norm.weight, 0.5, 1.5) * sign)
                norm.bias.copy_(uniform(norm.bias, -1, 1))
        if x is None:
            return network
        for norm in norms:
            norm.train()
        network(x)
        for norm in norms:
            norm.running_mean += uniform(norm.running_mean, -0.5, 0.5) * norm.running_var.sqrt()
            norm.running_var *= uniform(norm.running_var, 0.5, 2)
            # A channel that hardly varies would be blown up, and its rounding with it.
            norm.running_var.clamp_(min=norm.running_mean.square() / 4)
    return network.eval()


def speaking(classifier, x, *, centred=False):
    """Rescale the last layer so that logits have a standard deviation of 2 over `x`.

    `centred`: each class for itself and around zero, so that answers differ from photo to photo.
    """
    with torch.no_grad():
        last, logits = classifier.head[-1], classifier(x)
        factor = 2 / (logits.std(dim=0) if centred else logits.std().expand(logits.shape[1]))
        last.weight.mul_(factor[:, None])
        last.bias.copy_((last.bias - logits.mean(dim=0) * centred) * factor)
        assert classifier(x).std() >= 1
    return classifier


def pixels(count, size, seed=0):
    """Photo-like squares over the whole range of values: uint8 [count, size, size, 3].

    Some are coarse and some fine, some dark, bright or of one hue, as photos are.
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
    """A run's folder with a small classifier that was never trained, and its photos."""

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
        self.dataset = data.load(str(self.photos), config=DataConfig(valid=0.5))
        torch.manual_seed(0)
        options = {"arch_args": {"width_mult": 0.25}, "head": {"hidden": 16}}
        self.classifier = model.build("mobilenet_v2", 3, **options)
        self.liven()
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
        data.write_split(self.dataset, self.folder / data.SPLIT)

    def liven(self, *, centred=True):
        """Make the network answer differently to its photos; `centred` as in `speaking`."""
        squares = [self.preprocess(images.read(s.path).image) for s in self.dataset.valid]
        x = model.normalise(torch.from_numpy(np.stack(squares)), self.preprocess)
        speaking(lively(self.classifier, x), x, centred=centred)

    def save(self):
        checkpoint.save(self.folder / checkpoint.BEST, self.classifier, self.info)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """For tests that only read it."""
    return Run(tmp_path_factory.mktemp("shared"))


_WRITTEN = {}


@pytest.fixture
def remembered(monkeypatch):
    """The exporter takes seconds: what it gave for these very weights is used again."""

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
    """Small networks gain nothing from more, and threads that wait for each other spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
