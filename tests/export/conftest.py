import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from serving.preprocess import Preprocess
from training import checkpoint, data, model


def lively(network, seed=0):
    """Give a network BatchNorms that do something: a fresh one's are the identity.

    Means, variances in 0.5 to 2, gains of both signs, offsets; all drawn.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return drawn * (high - low) + low

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(uniform(module.running_mean, -1, 1))
                module.running_var.copy_(uniform(module.running_var, 0.5, 2))
                if module.affine:
                    sign = uniform(module.weight, -1, 3).sign()  # a quarter negative
                    module.weight.copy_(uniform(module.weight, 0.5, 1.5) * sign)
                    module.bias.copy_(uniform(module.bias, -1, 1))
    return network.eval()


def speaking(classifier, images):
    """Rescale the last layer so that logits on `images` have a standard deviation of 2."""
    with torch.no_grad():
        last = classifier.head[-1]
        factor = 2 / classifier(images).std()
        last.weight.mul_(factor)
        last.bias.mul_(factor)
        assert classifier(images).std() >= 1
    return classifier


def pixels(count, size, seed=0):
    """Photo-like squares over the whole range of values: uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    squares = [Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC) for c in coarse]
    return torch.from_numpy(np.stack([np.asarray(square) for square in squares]))


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
        self.dataset = data.load(str(self.photos), valid=0.5)
        torch.manual_seed(0)
        options = {"arch_args": {"width_mult": 0.25}, "head": {"hidden": 16}}
        self.classifier = lively(model.build("mobilenet_v2", 3, **options))
        speaking(self.classifier, model.normalise(pixels(16, 32), self.preprocess))
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

    def save(self):
        checkpoint.save(self.folder / checkpoint.BEST, self.classifier, self.info)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """For tests that only read it."""
    return Run(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small networks gain nothing from more, and threads that wait for each other spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
