"""Static int8 quantisation: find the configuration whose probabilities diverge least from fp32.

    model.onnx -> ranges of 100 training photos -> QDQ graphs -> compared on 200 other photos

`select.py` then keeps or refuses the result by its accuracy on held-out photos. Activations are
uint8 and weights int8, as VNNI instructions of CPUs require. Weights are limited to -64 to 64,
because CPUs without VNNI add two products in 16 bits, and this sum saturates with larger weights.
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
from serving.errors import ImageError, WorkError
from serving.imaging import decode
from serving.imaging.preprocess import Pixels, Preprocess
from serving.imaging.tta import softmax
from serving.utils.progress import progress_bar

CALIBRATE: Final = 100  # photos for activation ranges
SEARCH: Final = 200  # photos on which configurations are compared
DRAWN: Final = CALIBRATE + SEARCH
_RANKING: Final = 50  # photos on which single layers are ranked
_CHUNK: Final = 8  # photos whose activations are in memory at once
_SIMILAR: Final = 1.5  # divergences up to this multiple of the smallest one are considered similar
_LAYERS: Final = ("Conv", "Gemm", "MatMul")
_METHODS: Final = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
}

Floats = npt.NDArray[np.float32]


class QuantConfig(NamedTuple):
    """A quantisation configuration, and how its outputs compare with those of the fp32 graph.

    Attributes:
        method: How ranges are computed from activations: "minmax" or "percentile".
        per_channel: Whether a weight has one scale per output channel instead of one per tensor.
        float_layers: Names of layers that stay in float32.
        divergence: Mean Kullback-Leibler divergence from the probabilities of fp32, in nats.
        agreement: Share of photos for which both graphs predict the same class.
    """

    method: str
    per_channel: bool
    float_layers: tuple[str, ...]
    divergence: float = 0.0
    agreement: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return an entry for the manifest's list `tried.int8.ways`."""
        return {
            "calibration": self.method,
            "scales": "per channel" if self.per_channel else "per tensor",
            "float_layers": list(self.float_layers),
            "divergence": float(f"{self.divergence:.4g}"),
            "agreement": self.agreement,
        }


class QuantSearch(NamedTuple):
    """The result of a search for a quantisation configuration.

    Attributes:
        config: The chosen configuration.
        model: The graph quantised with that configuration.
        tried: All configurations that were compared.
    """

    config: QuantConfig
    model: onnx.ModelProto
    tried: tuple[QuantConfig, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the search's values for the manifest's entry `tried.int8`."""
        return {"way": self.config.to_dict(), "ways": [config.to_dict() for config in self.tried]}


def order(samples: Sequence[Sample]) -> list[Path]:
    """Return the photos in the order in which `draw` takes them, the same on every call.

    Photos are taken from each class in turn, to balance the classes as far as they have enough
    photos.
    """
    by_class: dict[int, list[Path]] = {}
    for path, label in samples:
        by_class.setdefault(label, []).append(path)
    shuffle = random.Random(0).shuffle
    for paths in by_class.values():
        shuffle(paths)
    turns = max(map(len, by_class.values()), default=0)
    return [paths[i] for i in range(turns) for paths in by_class.values() if i < len(paths)]


def draw(samples: Sequence[Sample], preprocess: Preprocess, workers: int = 1) -> Pixels:
    """Draw photos for calibration and comparison: uint8 [N, size, size, 3], the same on every call.

    They are the first 300 of `order`, without those that can't be read.

    Raises:
        WorkError: Fewer than 20 photos can be read.
    """

    def read(path: Path) -> Pixels | None:
        try:
            decoded = decode.read(path, preprocess=preprocess)
            return preprocess(decoded.image, decoded.area)
        except (ImageError, OSError):
            return None

    with ThreadPoolExecutor(workers) as pool:
        images = pool.map(read, order(samples)[:DRAWN])
        pixels = [image for image in images if image is not None]
    if len(pixels) < 20:
        raise WorkError(
            f"{len(pixels)} training photos can be read, and 20 are needed to calibrate on: "
            "name their folder with --data, or use --precision fp32"
        )
    return np.stack(pixels)


def search(source: Path, pixels: Pixels, min_agreement: float) -> QuantSearch:
    """Compare quantisation configurations, and return the best one.

    If no configuration agrees with fp32 on enough photos, further layers are left in float32.

    Args:
        source: File of the fp32 graph.
        pixels: The photos that `draw` returns. Up to a third of them are used for calibration.
        min_agreement: Required share of photos for which the predicted class is that of fp32.

    Raises:
        WorkError: The graph can't be quantised.
    """
    calibrating = min(CALIBRATE, len(pixels) // 3)
    graph = onnx.shape_inference.infer_shapes(onnx.load(source))
    layers = [node.name for node in graph.graph.node if node.op_type in _LAYERS]
    ends = [(), tuple(layers[-1:]), tuple(dict.fromkeys([*layers[:1], *layers[-1:]]))]
    total = len(_METHODS) * 2 * len(ends)
    with progress_bar() as bar:
        task = bar.add_task("int8: configurations", total=total)
        compare = _Comparison(source, pixels[calibrating:])
        by_method = {name: ranges(source, pixels[:calibrating], name) for name in _METHODS}
        tried: list[QuantConfig] = []

        def evaluate(config: QuantConfig, photos: int | None = None) -> QuantConfig:
            model = _quantised(graph, by_method[config.method], config)
            return compare(config, model, photos)

        for method in _METHODS:
            for per_channel in (False, True):
                for float_layers in ends:
                    tried.append(evaluate(QuantConfig(method, per_channel, float_layers)))
                    bar.advance(task)
        if all(config.agreement < min_agreement for config in tried):
            tried += _leave_sensitive_layers(_choose(tried), layers, min_agreement, evaluate, bar)
        agreeing = [config for config in tried if config.agreement >= min_agreement]
        best = _choose(agreeing) if agreeing else min(tried, key=lambda config: config.divergence)
    return QuantSearch(best, _quantised(graph, by_method[best.method], best), tuple(tried))


def quantise(source: Path, pixels: Pixels, config: QuantConfig) -> onnx.ModelProto:
    """Quantise another graph of the same network with a configuration that `search` has chosen.

    Args:
        source: File of the fp32 graph.
        pixels: The photos that `draw` returns, as for `search`.
        config: The configuration.
    """
    calibrating = min(CALIBRATE, len(pixels) // 3)
    graph = onnx.shape_inference.infer_shapes(onnx.load(source))
    return _quantised(graph, ranges(source, pixels[:calibrating], config.method), config)


def _choose(tried: Sequence[QuantConfig]) -> QuantConfig:
    """Choose the configuration with the fewest float32 layers among those with low divergence.

    Divergence is low if it is at most 1.5 times the smallest one. A graph with fewer float32 layers
    is faster. Speed is not measured here, because timings vary, and exporting the same run again
    must give the same bytes.
    """
    limit = _SIMILAR * min(config.divergence for config in tried)
    near = [config for config in tried if config.divergence <= limit]
    return min(near, key=lambda config: (len(config.float_layers), config.divergence))


def _leave_sensitive_layers(
    best: QuantConfig,
    layers: Sequence[str],
    min_agreement: float,
    evaluate: Callable[[QuantConfig, int | None], QuantConfig],
    bar: Any,
) -> Iterator[QuantConfig]:
    """Yield `best` with its 1, 2, 4, ... most sensitive layers in float32, up to a quarter of all.

    A layer is more sensitive if leaving this one layer in float32 reduces the divergence more. The
    search ends at the first configuration with enough agreement.
    """
    rest = [name for name in layers if name not in best.float_layers]
    task = bar.add_task("int8: sensitive layers", total=len(rest))
    by_divergence = []
    for name in rest:
        config = evaluate(best._replace(float_layers=(*best.float_layers, name)), _RANKING)
        by_divergence.append((config.divergence, name))
        bar.advance(task)
    ranked = [name for _, name in sorted(by_divergence)]
    count = 1
    while count <= max(1, len(layers) // 4):
        float_layers = (*best.float_layers, *ranked[:count])
        config = evaluate(best._replace(float_layers=float_layers), None)
        yield config
        if config.agreement >= min_agreement:
            return
        count *= 2


class _Comparison:
    """Function object that compares quantised graphs with the fp32 graph on fixed photos."""

    def __init__(self, source: Path, pixels: Pixels) -> None:
        self._pixels = pixels
        self._logits = _logits(source.read_bytes(), pixels)

    def __call__(
        self, config: QuantConfig, model: onnx.ModelProto, photos: int | None = None
    ) -> QuantConfig:
        """Return `config` with its divergence and agreement on the first photos.

        Args:
            config: The configuration with which `model` was quantised.
            model: The quantised graph.
            photos: Number of photos to compare on; None: all.
        """
        pixels, expected = self._pixels[:photos], self._logits[:photos]
        actual = _logits(model.SerializeToString(), pixels)
        if not np.isfinite(actual).all():
            return config._replace(divergence=float("inf"))
        p, q = (np.maximum(softmax(logits), 1e-12) for logits in (expected, actual))
        return config._replace(
            divergence=max(0.0, float((p * np.log(p / q)).sum(axis=1).mean())),
            agreement=float((expected.argmax(axis=1) == actual.argmax(axis=1)).mean()),
        )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Data reader for ONNX Runtime's calibrator: returns one photo at a time, as a batch of 1."""

    def __init__(self, pixels: Pixels) -> None:
        self._rows = iter(pixels)

    def get_next(self) -> dict[str, Pixels] | None:
        row = next(self._rows, None)
        return None if row is None else {"pixels": row[None]}


def ranges(source: Path, pixels: Pixels, method: str, *, all_tensors: bool = False) -> TensorsData:
    """Measure the value ranges of the activations over the given photos.

    Args:
        source: File of the fp32 graph.
        pixels: Photos, uint8 [N, size, size, 3].
        method: "minmax" or "percentile".
        all_tensors: Whether to measure all tensors, or only those of operators that can be
            quantised.
    """
    # The calibrator prints its progress.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            source,
            None if all_tensors else list(QDQRegistry),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=_METHODS[method],
            extra_options={"symmetric": False, "percentile": 99.99},
        )
        # In chunks, because "percentile" holds all activations of a call in memory.
        for start in range(0, len(pixels), _CHUNK):
            calibrator.collect_data(_Reader(pixels[start : start + _CHUNK]))
        data: TensorsData = calibrator.compute_data()
        return data


def _quantised(graph: onnx.ModelProto, ranges: TensorsData, config: QuantConfig) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)  # the quantiser changes its input
    layers = [node for node in graph.graph.node if node.op_type in _LAYERS]
    multiplied = {name for layer in layers for name in layer.input[1:]}
    # Weights that are not factors in sums of products (LayerNorm gains, added constants) may use
    # all 8 bits.
    others = [
        one.name
        for one in graph.graph.initializer
        if one.data_type == onnx.TensorProto.FLOAT and one.name not in multiplied
    ]
    quantizer = QDQQuantizer(
        copy,
        config.per_channel,
        True,  # weights from -64 to 64
        QuantType.QInt8,
        QuantType.QUInt8,
        ranges,
        [],
        list(config.float_layers),
        list(QDQRegistry),
        {"TensorQuantOverrides": {name: [{"reduce_range": False}] for name in others}},
    )
    try:
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # the quantiser appends its nodes at the end
    except Exception as error:  # the quantiser has no exception class of its own
        raise WorkError(f"the graph can't be quantised: {error}") from error
    model: onnx.ModelProto = quantizer.model.model
    _move_relu_after_pooling(model)
    return model


def _move_relu_after_pooling(model: onnx.ModelProto) -> None:
    """Swap Relu and MaxPool if Relu comes first and a quantisation follows MaxPool.

    The values are the same, because max and Relu commute. Without the swap, ONNX Runtime moves the
    quantisation from after the MaxPool to before it, and then pools integers with channels first.
    This pooling takes half of the time of a SqueezeNet. ONNX Runtime does not move a quantisation
    before a Relu. It removes that Relu instead, because the quantisation clips at zero, too.
    """
    nodes = model.graph.node
    made_by = {name: index for index, node in enumerate(nodes) for name in node.output}
    outputs = {one.name for one in model.graph.output}
    users: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        for name in node.input:
            users.setdefault(name, []).append(index)
    for later, node in enumerate(nodes):
        earlier = made_by.get(node.input[0], -1) if node.op_type == "MaxPool" else -1
        if earlier < 0 or nodes[earlier].op_type != "Relu" or len(node.output) != 1:
            continue
        between, pooled = node.input[0], node.output[0]
        readers = {nodes[index].op_type for index in users.get(pooled, ())}
        if between in outputs or users[between] != [later] or readers != {"QuantizeLinear"}:
            continue
        relu, pool = onnx.NodeProto(), onnx.NodeProto()
        relu.CopyFrom(nodes[earlier])
        pool.CopyFrom(node)
        pool.input[0], pool.output[0] = relu.input[0], between
        relu.input[0], relu.output[0] = between, pooled
        nodes[earlier].CopyFrom(pool)
        nodes[later].CopyFrom(relu)
        shapes = model.graph.value_info
        for stale in [one for one in shapes if one.name == between]:
            shapes.remove(stale)


def _logits(graph: bytes, pixels: Pixels) -> Floats:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    rows = [session.run(["logits"], {"pixels": row[None]})[0] for row in pixels]
    return np.concatenate(rows)
