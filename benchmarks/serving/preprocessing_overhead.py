"""What it costs that a bundle's graph takes uint8 pixels: the whole graph against its core alone.

    python benchmarks/serving/app_overhead.py --bundle bundle

The core is the same graph from behind the subtraction of the mean: it takes float32
[1, 3, size, size] that somebody else has cast, centred and laid out. Both run on noise, one photo
at a time on one thread, in turns; medians of the rounds, and the ratio within each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import numpy as np
import onnx
import onnxruntime as ort
from onnx.utils import Extractor

from benchmarks import machine
from serving.bundle import storage

OUTPUTS = ["logits", "features"]


def main() -> int:
    """Time both for every precision of the bundle; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20, help="of each graph in a round")
    options = parser.parse_args()
    opened = storage.read(options.bundle)
    size = opened.manifest.preprocess.size
    print(f"{machine.describe(1, 'cpu')}, onnxruntime {ort.__version__}")
    print(f"{opened.manifest.arch} at {size} px\n")
    print("| precision | whole ms | core ms | whole to core |\n|---|---:|---:|---:|")
    noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    for precision in opened.manifest.precisions:
        model = onnx.load(opened.graph(precision))
        behind = next(node.output[0] for node in model.graph.node if node.op_type == "Sub")
        core = Extractor(onnx.shape_inference.infer_shapes(model)).extract_model([behind], OUTPUTS)
        floats = np.random.default_rng(0).normal(0, 60, (1, 3, size, size)).astype(np.float32)
        sides = [(session(model), {"pixels": noise}), (session(core), {behind: floats})]
        rounds = [
            [milliseconds(*side, options.runs) for side in sides] for _ in range(options.rounds)
        ]
        whole, alone = (statistics.median(side) for side in zip(*rounds, strict=True))
        ratio = statistics.median(one / other for one, other in rounds)
        print(f"| {precision} | {whole:.2f} | {alone:.2f} | {ratio:.3f} |")
    return 0


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """On one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def milliseconds(graph: ort.InferenceSession, feed: dict[str, np.ndarray], runs: int) -> float:
    """The median of some runs."""
    took = []
    for _ in range(runs):
        begun = time.perf_counter()
        graph.run(OUTPUTS, feed)
        took.append(time.perf_counter() - begun)
    return 1000 * statistics.median(took)


if __name__ == "__main__":
    sys.exit(main())
