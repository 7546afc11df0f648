"""float16 for GPUs: the graph with half-wide numbers, and float32 where those would overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.precision.int8 import CALIBRATE, ranges
from serving.errors import WorkError
from serving.imaging.preprocess import Pixels

LARGEST: Final = 65504.0 / 4
"""A layer that came across a larger number stays in float32: float16 ends at four times that, and
photos that nobody has seen may go further than those that were tried."""


def convert(source: Path, pixels: Pixels) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph in float16, inputs and outputs as they were, and what the manifest says of it.

    Args:
        source: The fp32 graph.
        pixels: Training photos, uint8 [N, size, size, 3]; the first hundred tell the ranges.

    Raises:
        WorkError: The graph can't be converted.
    """
    graph = onnx.load(source)
    large = {
        name
        for name, found in ranges(source, pixels[:CALIBRATE], "minmax", every=True).items()
        if np.abs(found.range_value).max() > LARGEST
    }
    kept = [node.name for node in graph.graph.node if large & {*node.input, *node.output}]
    try:
        model = convert_float_to_float16(graph, keep_io_types=True, node_block_list=kept)
    except Exception as error:  # the converter has no exceptions of its own
        raise WorkError(f"the graph can't be converted to float16: {error}") from error
    _straighten(model.graph)
    return model, {"float_layers": kept}


def _straighten(graph: onnx.GraphProto) -> None:
    """Take out what goes float32 -> float16 -> float32 and would overflow on the way.

    The converter has it between two layers that stay, and before an output.
    """
    narrowed = {
        node.output[0]: node.input[0] for node in graph.node if _casts_to(node, TensorProto.FLOAT16)
    }
    for node in graph.node:
        if _casts_to(node, TensorProto.FLOAT) and node.input[0] in narrowed:
            node.input[0] = narrowed[node.input[0]]


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == kind
