"""Batches of a few sizes only, for devices that prepare themselves for every new shape.

CUDA looks for its fastest convolution, and TensorRT builds an engine, when a shape comes for the
first time: seconds in the middle of traffic. So each size is run once while loading, and a batch
is filled up to the next of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from serving.imaging.preprocess import Pixels
from serving.inference.runtime import Floats, Runtime

SIZES: Final = (1, 2, 4, 8, 16)


class PaddedBatchRuntime:
    """A `Runtime` that runs another at a few batch sizes; answers are of the rows that came."""

    def __init__(self, engine: Runtime, size: int, sizes: Sequence[int] = SIZES) -> None:
        """Run every batch size once.

        Args:
            engine: What runs the graph.
            size: Side of its square input, in pixels.
            sizes: Batch sizes, ascending; a batch above the last is filled to a multiple of it.

        Raises:
            WorkError: The engine failed, as when it has not enough memory for the largest.
        """
        self._engine, self._sizes = engine, tuple(sizes)
        self.provider = engine.provider
        for rows in self._sizes:
            engine.run(np.zeros((rows, size, size, 3), np.uint8))

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """As `OnnxRuntime.run`."""
        rows = len(pixels)
        last = self._sizes[-1]
        whole = next((size for size in self._sizes if size >= rows), -(-rows // last) * last)
        if whole > rows:
            filled = np.zeros((whole, *pixels.shape[1:]), np.uint8)
            filled[:rows] = pixels
            pixels = filled
        logits, features = self._engine.run(pixels)
        return logits[:rows], features[:rows]
