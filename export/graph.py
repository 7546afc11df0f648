"""The graph contract: pixels in, logits and features out, nothing in between to get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from export.torchvision_checkpoint import WholeNetwork
from serving.imaging.preprocess import Pixels, Preprocess
from training.models.classifier import Classifier, normalise
from training.models.fuse_batchnorm import FusionReport, fuse

Exportable = Classifier | WholeNetwork
"""Has `features`, normalised images [N, 3, H, W] -> [N, D], and `head`, which takes them."""


class _Core(nn.Module):
    """A classifier with both outputs of the contract."""

    def __init__(self, classifier: Exportable) -> None:
        super().__init__()
        self.classifier = classifier
        # What `features` gives is a vector already, but for a network that is classified by maps.
        self.pool = classifier.pool if isinstance(classifier, WholeNetwork) else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images)
        # The head's first layers may work in place; what the caller gets must not change with them.
        logits: Tensor = self.classifier.head(features)
        return logits, self.pool(features)


class Graph(nn.Module):
    """Pixels uint8 [N, size, size, 3], RGB -> logits [N, classes], features [N, D].

    Features are the pooled input of the head. Cast, normalising and layout are inside. The division
    by 255 std lies in the first convolution's weights and a subtraction of the mean stands before
    it; that is exact at the borders too, since padding follows the subtraction. A network that
    starts in another way gets a multiplication as well.
    """

    mean: Tensor
    scale: Tensor | None

    def __init__(self, core: fx.GraphModule, preprocess: Preprocess) -> None:
        """Take a fused core: normalised images [N, 3, H, W] -> logits, features. It is changed."""
        super().__init__()
        dtype = next(core.parameters()).dtype
        mean = torch.tensor(preprocess.mean, dtype=torch.float64) * 255
        scale = 1 / (torch.tensor(preprocess.std, dtype=torch.float64) * 255)
        first = _first_convolution(core)
        if first is not None:
            weight = first.weight.detach().double() * scale.reshape(1, 3, 1, 1)
            first.weight = nn.Parameter(weight.to(dtype))
        self.register_buffer("mean", _rows(mean, preprocess.size).to(dtype))
        explicit = None if first is not None else _rows(scale, preprocess.size).to(dtype)
        self.register_buffer("scale", explicit)
        self.core = core
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As the class says."""
        images = pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean
        if self.scale is not None:
            images = images * self.scale
        logits, features = self.core(images)
        return logits, features


def _rows(channels: Tensor, size: int) -> Tensor:
    """A value for each channel, as [1, 3, 1, size].

    Before a quantised first layer ONNX Runtime subtracts with channels last, and of one value a
    channel it would take three at a time: a sixth of a small network. It takes a row at once.
    """
    return channels.reshape(1, 3, 1, 1).expand(1, 3, 1, size).contiguous()


def assemble(classifier: Exportable, preprocess: Preprocess) -> tuple[Graph, FusionReport]:
    """The fused graph of a classifier, which stays as it is, and what became of its BatchNorms.

    Raises:
        WorkError: The network can't be traced.
    """
    core, report = fuse(_Core(classifier))
    prefix = "classifier."
    report = FusionReport(
        {name.removeprefix(prefix): to.removeprefix(prefix) for name, to in report.folded.items()},
        {name.removeprefix(prefix): why for name, why in report.left.items()},
    )
    return Graph(core, preprocess).eval(), report


def example(preprocess: Preprocess, batch: int = 2) -> Tensor:
    """Noise to trace with: uint8 [batch, size, size, 3], the same every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, preprocess.size, preprocess.size, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def contract(graph: Graph, preprocess: Preprocess) -> Mapping[str, Any]:
    """The contract with this graph's numbers, for the manifest."""
    with torch.inference_mode():
        logits, features = graph(example(preprocess))
    size = preprocess.size
    return {
        "input": {"name": "pixels", "dtype": "uint8", "shape": ["batch", size, size, 3]},
        "outputs": {
            "logits": {"dtype": "float32", "shape": ["batch", logits.shape[1]]},
            "features": {"dtype": "float32", "shape": ["batch", features.shape[1]]},
        },
    }


class CheckpointRuntime:
    """The checkpoint itself as a `Runtime`: eager, float32, unfused, on the CPU.

    What every exported graph is measured against.
    """

    provider = "checkpoint"

    def __init__(self, classifier: Exportable, preprocess: Preprocess) -> None:
        """Take a classifier in eval mode and the Preprocess saved with it."""
        self._core, self._preprocess = _Core(classifier), preprocess

    def run(self, pixels: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Pixels uint8 [N, size, size, 3] -> logits [N, classes], features [N, D]."""
        with torch.inference_mode():
            # A copy: torch warns about the read-only arrays that Pillow gives.
            images = normalise(torch.from_numpy(pixels.copy()), self._preprocess)
            logits, features = self._core(images)
        return logits.numpy(), features.numpy()


def _first_convolution(core: fx.GraphModule) -> nn.Conv2d | None:
    """The convolution that alone reads the input, if it may be scaled."""
    source = next(node for node in core.graph.nodes if node.op == "placeholder")
    users = list(source.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    calls = sum(node.target == users[0].target for node in core.graph.nodes)
    layer = core.get_submodule(str(users[0].target))
    if calls == 1 and isinstance(layer, nn.Conv2d) and layer.weight.shape[1] == 3:
        return layer
    return None
