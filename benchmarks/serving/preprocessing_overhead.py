"""Cost of the preprocessing inside a bundle's graph: the whole graph against its float32 core.

    python -m benchmarks.serving.preprocessing_overhead --bundle bundle

The whole graph takes uint8 [1, size, size, 3] and casts, transposes and centres it. The core is the
part after the subtraction of the mean and takes float32 [1, 3, size, size]. Both run on noise, one
image at a time on one thread, in turns. The table has the medians over the rounds, and the median
of the ratios within a round.
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
    """Time both graphs for every precision of the bundle; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20, help="of each graph per round")
    options = parser.parse_args()
    opened = storage.read(options.bundle)
    size = opened.manifest.preprocess.size
    print(f"{machine.describe(1, 'cpu')}, onnxruntime {ort.__version__}")
    print(f"{opened.manifest.arch} at {size} px\n")
    print("| precision | whole ms | core ms | whole / core |\n|---|---:|---:|---:|")
    noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    for precision in opened.manifest.precisions:
        model = onnx.load(opened.graph(precision))
        core_input = next(node.output[0] for node in model.graph.node if node.op_type == "Sub")
        extractor = Extractor(onnx.shape_inference.infer_shapes(model))
        core = extractor.extract_model([core_input], OUTPUTS)
        floats = np.random.default_rng(0).normal(0, 60, (1, 3, size, size)).astype(np.float32)
        graphs = [(session(model), {"pixels": noise}), (session(core), {core_input: floats})]
        rounds = [
            [milliseconds(*graph, options.runs) for graph in graphs] for _ in range(options.rounds)
        ]
        whole_ms, core_ms = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(whole / part for whole, part in rounds)
        print(f"| {precision} | {whole_ms:.2f} | {core_ms:.2f} | {ratio:.3f} |")
    return 0


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A CPU session with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def milliseconds(graph: ort.InferenceSession, inputs: dict[str, np.ndarray], runs: int) -> float:
    """The median of `runs` runs."""
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        graph.run(OUTPUTS, inputs)
        seconds.append(time.perf_counter() - begun)
    return 1000 * statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
