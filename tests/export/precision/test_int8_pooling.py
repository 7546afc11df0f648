"""Max pooling between a float layer and a quantised one."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.precision import int8

NODES = [
    helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
    helper.make_node("Transpose", ["cast"], ["first"], perm=[0, 3, 1, 2]),
    helper.make_node("Conv", ["first", "w1"], ["conv1"], "stem", pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["conv1"], ["relu1"]),
    helper.make_node("MaxPool", ["relu1"], ["pool1"], kernel_shape=[3, 3], strides=[2, 2]),
    helper.make_node("Conv", ["pool1", "w2"], ["conv2"], "second"),
    helper.make_node("Relu", ["conv2"], ["relu2"]),
    helper.make_node("ReduceMean", ["relu2"], ["features"], axes=[2, 3], keepdims=0),
    helper.make_node("MatMul", ["features", "w3"], ["logits"], "last"),
]


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, (8, 17, 17, 3)).astype(np.uint8)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.onnx"
    write(NODES, path)
    return path


def write(nodes, path):
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "w2": (16, 16, 1, 1), "w3": (16, 5)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    shape = ["batch", 17, 17, 3]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def quantised(source, pixels, float_layers):
    graph = onnx.shape_inference.infer_shapes(onnx.load(source))
    ranges = int8.ranges(source, pixels, "minmax")
    return int8._quantised(graph, ranges, int8.QuantConfig("minmax", True, float_layers))


def before(graph, operator):
    """Operators before the first node of a kind, along first inputs, nearest first."""
    made_by = {name: node for node in graph.node for name in node.output}
    name, operators = next(node.input[0] for node in graph.node if node.op_type == operator), []
    while name in made_by:
        operators.append(made_by[name].op_type)
        name = made_by[name].input[0]
    return operators


def run(model, pixels, optimised=None):
    options = ort.SessionOptions()
    if optimised is None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimised)
        # Higher levels depend on the processor.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"pixels": pixels})[0]


def test_pooling_after_a_float_layer_stays_in_float_with_equal_outputs(
    source, pixels, tmp_path, monkeypatch
):
    model = quantised(source, pixels, ("stem",))
    onnx.checker.check_model(model, full_check=True)
    assert before(model.graph, "QuantizeLinear")[:3] == ["Relu", "MaxPool", "Conv"]
    optimised = tmp_path / "optimised.onnx"
    run(model, pixels, optimised)
    assert "QuantizeLinear" not in before(onnx.load(optimised).graph, "MaxPool")
    monkeypatch.setattr(int8, "_move_relu_after_pooling", lambda model: None)
    unchanged = quantised(source, pixels, ("stem",))
    assert before(unchanged.graph, "QuantizeLinear")[:3] == ["MaxPool", "Relu", "Conv"]
    run(unchanged, pixels, optimised)
    # If this fails, ONNX Runtime no longer moves the quantisation before the pooling, and
    # `int8._move_relu_after_pooling` can be removed.
    assert "QuantizeLinear" in before(onnx.load(optimised).graph, "MaxPool")
    assert np.array_equal(run(model, pixels), run(unchanged, pixels))


def test_pooling_between_quantised_layers_is_unchanged(source, pixels, monkeypatch):
    model = quantised(source, pixels, ())
    monkeypatch.setattr(int8, "_move_relu_after_pooling", lambda model: None)
    assert model == quantised(source, pixels, ())


@pytest.mark.parametrize("reader", ["node", "output"])
def test_a_relu_with_another_reader_is_unchanged(tmp_path, pixels, reader):
    source = tmp_path / "shared.onnx"
    mean = helper.make_node("ReduceMean", ["relu1"], ["mean"], axes=[2, 3], keepdims=0)
    both = helper.make_node("Add", ["mean", "features"], ["sum"])
    last = helper.make_node("MatMul", ["sum", "w3"], ["logits"], "last")
    write([*NODES[:8], mean, both, last] if reader == "node" else NODES, source)
    if reader == "output":
        model = onnx.load(source)
        shape = ["batch", 16, 17, 17]
        model.graph.output.append(helper.make_tensor_value_info("relu1", TensorProto.FLOAT, shape))
        onnx.save(model, source)
    model = quantised(source, pixels, ("stem",))
    assert before(model.graph, "MaxPool")[0] == "Relu"
    onnx.checker.check_model(model, full_check=True)
