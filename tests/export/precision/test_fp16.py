"""float16: half the size, equal outputs but for rounding, float32 where values could overflow."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from export import benchmark
from export.precision import fp16, int8, select
from serving.bundle import storage
from serving.inference.load import open_predictor, verify
from serving.inference.runtime import OnnxRuntime
from tests.export.conftest import export, pixels, rates


@pytest.fixture(scope="module")
def exported(shared_run, recorded, tmp_path_factory):
    """A bundle with fp16, compared on the CPU in place of a GPU, and the log lines."""
    out, lines = tmp_path_factory.mktemp("half") / "bundle", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "measure", rates)
        recorded.patch(patch)
        kind = select.KINDS["fp16"]._replace(device="cpu")
        patch.setattr(select, "KINDS", {"fp16": kind})
        export(shared_run, out, precision="fp16", accuracy_budget=50, log=lines.append)
    return out, lines


def test_a_kept_fp16_graph_is_in_the_bundle_logged_and_verified(exported):
    out, lines = exported
    manifest = storage.read(out).manifest
    assert list(manifest.precisions) == ["fp32", "fp16"]
    assert manifest.tried["fp16"]["kept"]
    assert manifest.tried["fp16"]["float_layers"] == []
    assert any(line.startswith("fp16 kept; on 21 held-out photos") for line in lines)
    assert any(line.startswith("fp16 on CPUExecutionProvider") for line in verify(out))
    assert open_predictor(out, device="cpu").precision == "fp32"  # not used on CPUs
    sizes = [manifest.files[manifest.precisions[p]["file"]]["bytes"] for p in ("fp32", "fp16")]
    assert sizes[1] < 0.6 * sizes[0]


def test_fp16_outputs_differ_from_fp32_by_rounding_only(exported):
    opened = storage.read(exported[0])
    x = pixels(7, 32).numpy()
    expected, actual = (OnnxRuntime(opened.graph(p), device="cpu").run(x) for p in ("fp32", "fp16"))
    for one, other in zip(expected, actual, strict=True):
        assert other.dtype == np.float32
        assert 0 < np.abs(one - other).max() <= 0.05 * np.abs(one).max()


def test_layers_that_would_overflow_stay_in_float32(exported, tmp_path):
    graph = onnx.load(storage.read(exported[0]).graph("fp32"))
    last = [node for node in graph.graph.node if node.op_type == "Gemm"][-1]
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name in last.input[1:]:  # logits of a million
        large = numpy_helper.to_array(weights[name]) * np.float32(1e6)
        weights[name].CopyFrom(numpy_helper.from_array(large, name))
    onnx.save(graph, tmp_path / "large.onnx")
    x = pixels(30, 32).numpy()
    model, facts = fp16.convert(tmp_path / "large.onnx", x)
    assert facts["float_layers"] == [last.name]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert TensorProto.FLOAT16 in types.values()
    assert types[last.input[1]] == TensorProto.FLOAT
    onnx.save(model, tmp_path / "half.onnx")
    expected, actual = (
        OnnxRuntime(tmp_path / name, device="cpu").run(x)[0] for name in ("large.onnx", "half.onnx")
    )
    assert np.abs(expected - actual).max() <= 0.05 * np.abs(expected).max()


def test_ranges_with_all_tensors_include_every_layer(exported):
    source = storage.read(exported[0]).graph("fp32")
    every = int8.ranges(source, pixels(9, 32).numpy(), "minmax", all_tensors=True)
    some = int8.ranges(source, pixels(9, 32).numpy(), "minmax")
    assert "logits" in dict(every.items())
    assert set(dict(some.items())) <= set(dict(every.items()))
