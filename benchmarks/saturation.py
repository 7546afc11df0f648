r"""Errors of int8 inference on this processor, compared with exact integer arithmetic.

    python -m benchmarks.saturation --bundle BUNDLE --photos DIR

The bundle's float32 graph is quantised with weights up to 127 and up to 64, with a scale per tensor
and per channel. Each graph runs on 200 photos twice: with ONNX Runtime's int8 kernels, and without
its optimisations, where it computes the same integers as floats. Processors without VNNI add two
products in 16 bits and saturate; on the others all rows are alike.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry

from benchmarks import machine
from export.precision import int8
from serving.bundle import storage
from serving.imaging.tta import softmax
from serving.utils.cpu import cores


def main() -> int:
    """Compare the graphs, print a table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True, help="one folder per class")
    options = parser.parse_args()
    opened = storage.read(options.bundle)
    folders = sorted(path for path in options.photos.iterdir() if path.is_dir())
    samples = [
        (path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    pixels = int8.draw(samples, opened.manifest.preprocess, cores())
    calibrate, tested = pixels[: int8.CALIBRATE], pixels[int8.CALIBRATE :]
    source = opened.payload / "model.onnx"
    ranges = int8.ranges(source, calibrate, "minmax")
    graph = onnx.shape_inference.infer_shapes(onnx.load(source))
    print(machine.describe(cores(), "cpu"), f"ONNX Runtime {ort.__version__}\n")
    print(f"{opened.manifest.arch}, {len(tested)} photos\n")
    print("| scales | weights up to | largest difference | median | other best class |")
    print("|---|---:|---:|---:|---:|")
    for per_channel in (False, True):
        for largest in (127, 64):
            model = quantised(graph, ranges, per_channel, reduce_range=largest == 64)
            here, exact = (probabilities(model, tested, on) for on in (True, False))
            differences = np.abs(here - exact).max(axis=1)
            other = (here.argmax(axis=1) != exact.argmax(axis=1)).mean()
            name = "per channel" if per_channel else "per tensor"
            cells = f"{differences.max():.3f} | {np.median(differences):.5f} | {other:.1%}"
            print(f"| {name} | {largest} | {cells} |", flush=True)
    return 0


def quantised(
    graph: onnx.ModelProto, ranges: object, per_channel: bool, *, reduce_range: bool
) -> bytes:
    """The graph in QDQ form, all operators quantised, as the export does it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    types = (QuantType.QInt8, QuantType.QUInt8)
    every = list(QDQRegistry)
    quantizer = QDQQuantizer(copy, per_channel, reduce_range, *types, ranges, [], [], every, {})
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model.SerializeToString()


def probabilities(model: bytes, pixels: np.ndarray, optimised: bool) -> np.ndarray:
    """Softmax of the logits: float64 [N, classes]. pixels: uint8 [N, size, size, 3]."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate(
        [softmax(session.run(["logits"], {"pixels": row[None]})[0]) for row in pixels]
    )


if __name__ == "__main__":
    sys.exit(main())
