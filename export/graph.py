"""Build the network that is exported: uint8 pixels in, logits and features out.

Normalisation is part of the graph. `CheckpointRuntime` runs the checkpoint itself, as the reference
with which exported graphs are compared (the parity gate).
"""

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
"""Has `features`, normalised images [N, 3, H, W] -> [N, D], and `head`, [N, D] -> logits.

For SqueezeNet, `features` returns feature maps, which `WholeNetwork.pool` converts to [N, D].
"""


class _Core(nn.Module):
    """A classifier with two outputs: logits [N, classes] and feature vectors [N, D]."""

    def __init__(self, classifier: Exportable) -> None:
        super().__init__()
        self.classifier = classifier
        # The head of SqueezeNet takes feature maps; in all other networks `features` are vectors.
        self.pool = classifier.pool if isinstance(classifier, WholeNetwork) else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images)
        logits: Tensor = self.classifier.head(features)
        return logits, self.pool(features)


class Graph(nn.Module):
    """The exported network: uint8 RGB pixels -> logits [N, classes], features [N, D].

    Pixels have the shape [N, size, size, 3], and features are the pooled input of the head. The
    graph casts, permutes and normalises the pixels: it subtracts the mean, and the division by
    255 std is folded into the weights of the first convolution. Folding is exact at the image
    borders, too, because zero padding comes after the subtraction. If the network does not begin
    with a convolution, a multiplication is used instead.
    """

    mean: Tensor
    scale: Tensor | None

    def __init__(self, core: fx.GraphModule, preprocess: Preprocess) -> None:
        """Add normalisation to a network; the network is modified.

        Args:
            core: Network with fused BatchNorms: normalised images [N, 3, H, W] -> logits, features.
            preprocess: Mean, std and image size of the network's input.
        """
        super().__init__()
        dtype = next(core.parameters()).dtype
        mean = torch.tensor(preprocess.mean, dtype=torch.float64) * 255
        scale = 1 / (torch.tensor(preprocess.std, dtype=torch.float64) * 255)
        first = _first_convolution(core)
        if first is not None:
            weight = first.weight.detach().double() * scale.reshape(1, 3, 1, 1)
            first.weight = nn.Parameter(weight.to(dtype))
        self.register_buffer("mean", _by_row(mean, preprocess.size).to(dtype))
        explicit = None if first is not None else _by_row(scale, preprocess.size).to(dtype)
        self.register_buffer("scale", explicit)
        self.core = core
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean
        if self.scale is not None:
            images = images * self.scale
        logits, features = self.core(images)
        return logits, features


def _by_row(channels: Tensor, size: int) -> Tensor:
    """Repeat one value per channel, [3], to the shape [1, 3, 1, size].

    If the first layer is quantised, ONNX Runtime subtracts in channels-last layout. With one value
    per channel its inner loop has only three elements, and the subtraction takes a sixth of a small
    network's time. With one value per channel and column the inner loop has 3 * size elements.
    """
    return channels.reshape(1, 3, 1, 1).expand(1, 3, 1, size).contiguous()


def assemble(classifier: Exportable, preprocess: Preprocess) -> tuple[Graph, FusionReport]:
    """Build the graph of a classifier, with BatchNorms folded into other layers where possible.

    `classifier` is unchanged. The report says which BatchNorms were folded.

    Raises:
        WorkError: torch.fx can't trace the network.
    """
    core, report = fuse(_Core(classifier))
    prefix = "classifier."
    report = FusionReport(
        {name.removeprefix(prefix): to.removeprefix(prefix) for name, to in report.folded.items()},
        {name.removeprefix(prefix): why for name, why in report.left.items()},
    )
    return Graph(core, preprocess).eval(), report


def example(preprocess: Preprocess, batch: int = 2) -> Tensor:
    """Return noise for tracing the graph: uint8 [batch, size, size, 3], the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, preprocess.size, preprocess.size, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def contract(graph: Graph, preprocess: Preprocess) -> Mapping[str, Any]:
    """Return the manifest's `graph` entry: names, dtypes and shapes of inputs and outputs."""
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
    """A `Runtime` that runs the checkpoint's network in eager mode: float32, not fused, on the CPU.

    The probabilities of exported graphs are compared with those of this runtime (the parity gate).
    """

    provider = "checkpoint"

    def __init__(self, classifier: Exportable, preprocess: Preprocess) -> None:
        """Store a classifier in eval mode and the preprocessing that was saved with it."""
        self._core, self._preprocess = _Core(classifier), preprocess

    def run(self, pixels: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Compute logits [N, classes] and features [N, D] of pixels, uint8 [N, size, size, 3]."""
        with torch.inference_mode():
            # A copy, because torch warns about read-only arrays, which Pillow returns.
            images = normalise(torch.from_numpy(pixels.copy()), self._preprocess)
            logits, features = self._core(images)
        return logits.numpy(), features.numpy()


def _first_convolution(core: fx.GraphModule) -> nn.Conv2d | None:
    """Return the convolution whose weights can be scaled instead of the network's input, or None.

    It must be the only module that reads the input, have 3 input channels, and be called once.
    """
    source = next(node for node in core.graph.nodes if node.op == "placeholder")
    users = list(source.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    calls = sum(node.target == users[0].target for node in core.graph.nodes)
    layer = core.get_submodule(str(users[0].target))
    if calls == 1 and isinstance(layer, nn.Conv2d) and layer.weight.shape[1] == 3:
        return layer
    return None
