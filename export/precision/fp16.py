"""Convert a graph to float16 for GPUs; layers whose values could overflow stay in float32."""

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

MAX_VALUE: Final = 65504.0 / 4
"""A layer with a larger absolute value on the calibration photos stays in float32.

The limit is a quarter of float16's maximum, because other photos may reach larger values.
"""


def convert(source: Path, pixels: Pixels) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Convert a graph to float16; inputs and outputs keep their dtypes.

    Args:
        source: File of the fp32 graph.
        pixels: Training photos, uint8 [N, size, size, 3]. Value ranges are measured on the first
            100 of them.

    Returns:
        The graph, and a dict for the manifest: {"float_layers": names of layers left in float32}.

    Raises:
        WorkError: The graph can't be converted.
    """
    graph = onnx.load(source)
    large = {
        name
        for name, data in ranges(source, pixels[:CALIBRATE], "minmax", all_tensors=True).items()
        if np.abs(data.range_value).max() > MAX_VALUE
    }
    float_layers = [node.name for node in graph.graph.node if large & {*node.input, *node.output}]
    try:
        model = convert_float_to_float16(graph, keep_io_types=True, node_block_list=float_layers)
    except Exception as error:  # the converter has no exception class of its own
        raise WorkError(f"the graph can't be converted to float16: {error}") from error
    _remove_cast_pairs(model.graph)
    return model, {"float_layers": float_layers}


def _remove_cast_pairs(graph: onnx.GraphProto) -> None:
    """Bypass pairs of casts float32 -> float16 -> float32, in which a large value would overflow.

    The converter inserts these pairs between two float32 layers, and before an output.
    """
    sources = {
        node.output[0]: node.input[0] for node in graph.node if _casts_to(node, TensorProto.FLOAT16)
    }
    for node in graph.node:
        if _casts_to(node, TensorProto.FLOAT) and node.input[0] in sources:
            node.input[0] = sources[node.input[0]]


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == kind
