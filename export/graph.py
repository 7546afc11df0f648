"""The graph contract: input uint8 pixels, outputs logits and features, normalisation in the graph.

Also the checkpoint as a runtime, which is the reference of the parity gate.
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
    """A classifier that returns both outputs of the contract."""

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
    """Pixels uint8 [N, size, size, 3], RGB -> logits [N, classes], features [N, D].

    Features are the pooled input of the head. The graph casts, permutes and normalises the pixels.
    It subtracts the mean, and the division by 255 std is folded into the weights of the first
    convolution. Folding is exact at the borders, too, because zero padding follows the subtraction.
    In a network that does not begin with a convolution, the division is a separate multiplication.
    """

    mean: Tensor
    scale: Tensor | None

    def __init__(self, core: fx.GraphModule, preprocess: Preprocess) -> None:
        """Take a fused core, normalised images [N, 3, H, W] -> logits, features; it is modified."""
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
    """One value per channel [3], repeated to [1, 3, 1, size].

    If the first layer is quantised, ONNX Runtime subtracts in channels-last layout. With one value
    per channel its inner loop has only three elements, which takes a sixth of a small network's
    time. With a row of values the inner loop has 3 * size elements.
    """
    return channels.reshape(1, 3, 1, 1).expand(1, 3, 1, size).contiguous()


def assemble(classifier: Exportable, preprocess: Preprocess) -> tuple[Graph, FusionReport]:
    """The fused graph of a classifier, and which BatchNorms were folded; `classifier` is unchanged.

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
    """Noise to trace with: uint8 [batch, size, size, 3], the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, preprocess.size, preprocess.size, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def contract(graph: Graph, preprocess: Preprocess) -> Mapping[str, Any]:
    """The manifest's `graph` entry: names, dtypes and shapes of inputs and outputs."""
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
    """The checkpoint as a `Runtime`: eager, float32, unfused, on the CPU.

    It is the reference of the parity gate.
    """

    provider = "checkpoint"

    def __init__(self, classifier: Exportable, preprocess: Preprocess) -> None:
        """Take a classifier in eval mode and the Preprocess saved with it."""
        self._core, self._preprocess = _Core(classifier), preprocess

    def run(self, pixels: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Pixels uint8 [N, size, size, 3] -> logits [N, classes], features [N, D]."""
        with torch.inference_mode():
            # A copy, because torch warns about read-only arrays, which Pillow returns.
            images = normalise(torch.from_numpy(pixels.copy()), self._preprocess)
            logits, features = self._core(images)
        return logits.numpy(), features.numpy()


def _first_convolution(core: fx.GraphModule) -> nn.Conv2d | None:
    """The convolution whose weights can be scaled instead of the input; None if there is none.

    It must be the only module that reads the input, called once, with 3 input channels.
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
