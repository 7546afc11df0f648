"""Static int8: which of several ways to quantise the graph stays near to it, found on photos.

    model.onnx ─ranges of 100 training photos─> QDQ, per tensor or per channel ─200 others─> a way

Nothing is decided here: `precision.py` keeps what this finds, or refuses it, on held-out photos.
Activations are uint8 and weights int8, as processors with VNNI multiply them. Weights keep to
-64 … 64: others add two products in 16 bits, where larger ones saturate.
"""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry

from export.parity import Sample
from export.precision import pooling
from serving.errors import ImageError, WorkError
from serving.imaging import decode
from serving.imaging.preprocess import Pixels, Preprocess
from serving.imaging.tta import softmax
from serving.utils.progress import progress_bar

CALIBRATE: Final = 100
SEARCH: Final = 200
_LOOK: Final = 50  # photos by which layers are ranked
_CHUNK: Final = 8  # photos whose activations are in memory at once
_AS_NEAR: Final = 1.5  # times the least divergence: not worth a layer in float
_LAYERS: Final = ("Conv", "Gemm", "MatMul")
_METHODS: Final = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
}

Floats = npt.NDArray[np.float32]


class QuantConfig(NamedTuple):
    """One way to quantise.

    method: how ranges come from activations. per_channel: a scale for each channel of a weight.
    leave: layers that stay in float32. divergence: mean Kullback-Leibler divergence of its
    probabilities from the graph's, in nats. agreement: share of photos with the same best class.
    """

    method: str
    per_channel: bool
    leave: tuple[str, ...]
    divergence: float = 0.0
    agreement: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "calibration": self.method,
            "scales": "per channel" if self.per_channel else "per tensor",
            "float_layers": list(self.leave),
            "divergence": float(f"{self.divergence:.4g}"),
            "agreement": self.agreement,
        }


class QuantSearch(NamedTuple):
    """The way that was taken, its graph, and all that were tried."""

    way: QuantConfig
    model: onnx.ModelProto
    tried: tuple[QuantConfig, ...]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"way": self.way.to_dict(), "ways": [way.to_dict() for way in self.tried]}


def draw(samples: Sequence[Sample], preprocess: Preprocess, workers: int = 1) -> Pixels:
    """Photos to calibrate and search on, the same every time: uint8 [N, size, size, 3].

    As many of each class as there are of the rarest, as far as that goes. N is at most 300; broken
    photos are passed over.

    Raises:
        WorkError: Fewer than 20 can be read.
    """
    by_class: dict[int, list[Path]] = {}
    for path, label in samples:
        by_class.setdefault(label, []).append(path)
    shuffle = random.Random(0).shuffle
    for paths in by_class.values():
        shuffle(paths)
    turns = max(map(len, by_class.values()), default=0)
    order = [paths[i] for i in range(turns) for paths in by_class.values() if i < len(paths)]

    def read(path: Path) -> Pixels | None:
        try:
            return preprocess(decode.read(path, background=preprocess.background).image)
        except (ImageError, OSError):
            return None

    with ThreadPoolExecutor(workers) as pool:
        read_ones = pool.map(read, order[: CALIBRATE + SEARCH])
        pixels = [found for found in read_ones if found is not None]
    if len(pixels) < 20:
        raise WorkError(
            f"{len(pixels)} training photos can be read, and 20 are needed to calibrate on: "
            "name their folder with --data, or use --precision fp32"
        )
    return np.stack(pixels)


def search(source: Path, pixels: Pixels, enough: float) -> QuantSearch:
    """Try the ways, and leave more layers in float while fewer than `enough` best classes agree.

    Args:
        source: The fp32 graph.
        pixels: As `draw`; a third to calibrate on.
        enough: Share of the photos whose best class must stay.

    Raises:
        WorkError: The graph can't be quantised.
    """
    calibrating = min(CALIBRATE, len(pixels) // 3)
    graph = onnx.shape_inference.infer_shapes(onnx.load(source))
    layers = [node.name for node in graph.graph.node if node.op_type in _LAYERS]
    ends = [(), tuple(layers[-1:]), tuple(dict.fromkeys([*layers[:1], *layers[-1:]]))]
    total = len(_METHODS) * 2 * len(ends)
    with progress_bar() as bar:
        task = bar.add_task("int8: ways to quantise", total=total)
        ask = _Judge(source, pixels[calibrating:])
        found = {name: ranges(source, pixels[:calibrating], name) for name in _METHODS}
        tried: list[QuantConfig] = []

        def attempt(way: QuantConfig, photos: int | None = None) -> QuantConfig:
            model = _quantised(graph, found[way.method], way)
            return ask(way, model, photos)

        for method in _METHODS:
            for per_channel in (False, True):
                for leave in ends:
                    tried.append(attempt(QuantConfig(method, per_channel, leave)))
                    bar.advance(task)
        if all(way.agreement < enough for way in tried):
            tried += _with_worst_in_float(_choose(tried), layers, enough, attempt, bar)
        near = [way for way in tried if way.agreement >= enough]
        best = _choose(near) if near else min(tried, key=lambda way: way.divergence)
    return QuantSearch(best, _quantised(graph, found[best.method], best), tuple(tried))


def _choose(tried: Sequence[QuantConfig]) -> QuantConfig:
    """The nearest way, or one about as near that leaves fewer layers in float, which is faster.

    Nothing is timed: timings differ, and the same run shall give the same bytes.
    """
    limit = _AS_NEAR * min(way.divergence for way in tried)
    near = [way for way in tried if way.divergence <= limit]
    return min(near, key=lambda way: (len(way.leave), way.divergence))


def _with_worst_in_float(
    best: QuantConfig,
    layers: Sequence[str],
    enough: float,
    attempt: Callable[[QuantConfig, int | None], QuantConfig],
    bar: Any,
) -> Iterator[QuantConfig]:
    """The same way with the layers in float that gain most by it: 1, 2, 4, … a quarter of all."""
    rest = [name for name in layers if name not in best.leave]
    task = bar.add_task("int8: layers that mind", total=len(rest))
    alone = []
    for name in rest:
        found = attempt(best._replace(leave=(*best.leave, name)), _LOOK)
        alone.append((found.divergence, name))
        bar.advance(task)
    ranked = [name for _, name in sorted(alone)]
    count = 1
    while count <= max(1, len(layers) // 4):
        found = attempt(best._replace(leave=(*best.leave, *ranked[:count])), None)
        yield found
        if found.agreement >= enough:
            return
        count *= 2


class _Judge:
    """Compares a quantised graph with the one it came from."""

    def __init__(self, source: Path, pixels: Pixels) -> None:
        self._pixels = pixels
        self._logits = _logits(source.read_bytes(), pixels)

    def __call__(
        self, way: QuantConfig, model: onnx.ModelProto, photos: int | None = None
    ) -> QuantConfig:
        pixels, expected = self._pixels[:photos], self._logits[:photos]
        actual = _logits(model.SerializeToString(), pixels)
        if not np.isfinite(actual).all():
            return way._replace(divergence=float("inf"))
        p, q = (np.maximum(softmax(logits), 1e-12) for logits in (expected, actual))
        return way._replace(
            divergence=max(0.0, float((p * np.log(p / q)).sum(axis=1).mean())),
            agreement=float((expected.argmax(axis=1) == actual.argmax(axis=1)).mean()),
        )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands photos out one by one."""

    def __init__(self, pixels: Pixels) -> None:
        self._rows = iter(pixels)

    def get_next(self) -> dict[str, Pixels] | None:
        row = next(self._rows, None)
        return None if row is None else {"pixels": row[None]}


def ranges(source: Path, pixels: Pixels, method: str, *, every: bool = False) -> TensorsData:
    """What activations range over, a few photos at a time: histograms keep all of them.

    `method`: "minmax" or "percentile"; `every`: not only of the layers that can be quantised.
    """
    # It prints what it does.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            source,
            None if every else list(QDQRegistry),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=_METHODS[method],
            extra_options={"symmetric": False, "percentile": 99.99},
        )
        for start in range(0, len(pixels), _CHUNK):
            calibrator.collect_data(_Reader(pixels[start : start + _CHUNK]))
        found: TensorsData = calibrator.compute_data()
        return found


def _quantised(graph: onnx.ModelProto, ranges: TensorsData, way: QuantConfig) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)  # the quantiser changes what it is given
    layers = [node for node in graph.graph.node if node.op_type in _LAYERS]
    multiplied = {name for layer in layers for name in layer.input[1:]}
    # Gains of a LayerNorm and constants that are added are in no sum of products.
    others = [
        one.name
        for one in graph.graph.initializer
        if one.data_type == onnx.TensorProto.FLOAT and one.name not in multiplied
    ]
    quantizer = QDQQuantizer(
        copy,
        way.per_channel,
        True,  # weights from -64 to 64
        QuantType.QInt8,
        QuantType.QUInt8,
        ranges,
        [],
        list(way.leave),
        list(QDQRegistry),
        {"TensorQuantOverrides": {name: [{"reduce_range": False}] for name in others}},
    )
    try:
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # nodes that it adds stand at the end
    except Exception as error:  # the quantiser has no exceptions of its own
        raise WorkError(f"the graph can't be quantised: {error}") from error
    model: onnx.ModelProto = quantizer.model.model
    pooling.relu_behind(model)
    return model


def _logits(graph: bytes, pixels: Pixels) -> Floats:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    rows = [session.run(["logits"], {"pixels": row[None]})[0] for row in pixels]
    return np.concatenate(rows)
