"""A graph that reads other files is refused, wherever it names them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.errors import BundleError
from serving.inference import onnx_check
from serving.inference.load import open_predictor, verify
from serving.inference.runtime import OnnxRuntime
from tests.hostile.graphs import constant, external, loop, rewrite, with_graph
from tests.support.tiny_bundle import tiny_bundle


def in_main_graph(model: Any) -> None:
    external(next(one for one in model.graph.initializer if one.name == "weight"), "w.bin")


def in_constant(model: Any) -> None:
    tensor = next(one for one in model.graph.initializer if one.name == "weight")
    model.graph.initializer.remove(tensor)
    external(tensor, "w.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], value=tensor))


def _branch(tensor: Any) -> Any:
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    return helper.make_graph(
        [helper.make_node("Add", ["features", tensor.name], ["out"])], "branch", [], [out], [tensor]
    )


def in_subgraph(model: Any) -> None:
    node = helper.make_node(
        "If",
        ["yes"],
        ["unused"],
        then_branch=_branch(constant("a", 0, "a.bin")),
        else_branch=_branch(constant("b", 0)),
    )
    model.graph.node.append(node)
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))


def in_subgraph_of_subgraph(model: Any) -> None:
    inner = _branch(constant("a", 0, "a.bin"))
    for depth in range(20):
        node = helper.make_node(
            "If", ["yes"], [f"x{depth}"], then_branch=inner, else_branch=_branch(constant("b", 0))
        )
        out = helper.make_tensor_value_info(f"x{depth}", TensorProto.FLOAT, None)
        inner = helper.make_graph([node], "branch", [], [out])
    node = helper.make_node(
        "If", ["yes"], ["unused"], then_branch=inner, else_branch=_branch(constant("b", 0))
    )
    model.graph.node.append(node)
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))


def in_sparse_initializer(model: Any) -> None:
    indices = numpy_helper.from_array(np.array([0], np.int64), "indices")
    sparse = helper.make_sparse_tensor(constant("sparse", 1, "a.bin"), indices, [4])
    model.graph.sparse_initializer.append(sparse)


def in_indices_of_sparse_attribute(model: Any) -> None:
    indices = numpy_helper.from_array(np.array([0], np.int64), "indices")
    external(indices, "a.bin")
    sparse = helper.make_sparse_tensor(constant("values", 1), indices, [4])
    model.graph.node.append(helper.make_node("Constant", [], ["s"], sparse_value=sparse))


def in_list_of_tensors(model: Any) -> None:
    node = helper.make_node("Identity", ["features"], ["unused"])
    attribute = node.attribute.add(name="all", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.append(constant("a", 0))
    attribute.tensors.append(constant("b", 0, "a.bin"))
    model.graph.node.append(node)


def in_function(model: Any) -> None:
    node = helper.make_node("Constant", [], ["y"], value=constant("a", 0, "a.bin"))
    opset = helper.make_opsetid("", 17)
    model.functions.append(helper.make_function("own", "Zero", [], ["y"], [node], [opset]))


def in_default_of_function(model: Any) -> None:
    opset = helper.make_opsetid("", 17)
    node = helper.make_node("Identity", ["x"], ["y"])
    function = helper.make_function("own", "Same", ["x"], ["y"], [node], [opset])
    function.attribute_proto.append(helper.make_attribute("v", constant("a", 0, "a.bin")))
    model.functions.append(function)


def in_training_info(model: Any) -> None:
    info = model.training_info.add()
    info.initialization.initializer.append(constant("a", 0, "a.bin"))


def in_memory_of_the_process(model: Any) -> None:
    in_main_graph(model)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "*/_ORT_MEM_ADDR_/*"


def location_without_entries(model: Any) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def entries_without_location(model: Any) -> None:
    in_main_graph(model)
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")


def compiled_context(model: Any) -> None:
    node = helper.make_node(
        "EPContext",
        ["pixels"],
        ["unused"],
        domain="com.microsoft",
        embed_mode=0,
        ep_cache_context="../../engine",
    )
    model.graph.node.append(node)


PLACES: list[Callable[[Any], None]] = [
    *(in_main_graph, in_constant, in_subgraph, in_subgraph_of_subgraph, in_sparse_initializer),
    *(in_indices_of_sparse_attribute, in_list_of_tensors, in_function, in_default_of_function),
    *(in_training_info, in_memory_of_the_process, location_without_entries),
    *(entries_without_location, compiled_context),
]


@pytest.mark.parametrize("change", PLACES, ids=lambda change: change.__name__)
def test_a_graph_that_reads_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = with_graph(tmp_path / "bundle", change)
    for action in (verify, lambda folder: open_predictor(folder, device="cpu")):
        with pytest.raises(BundleError, match=r"(another file|compiled code).*export") as refused:
            action(folder)
        assert "\n" not in str(refused.value)


def test_an_empty_graph_is_refused_and_no_file_is_read_instead(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    rewrite(folder, "model.onnx", b"")
    with pytest.raises(BundleError, match=r"can't be loaded|contract"):
        verify(folder)


def test_the_data_given_is_used_and_not_the_file(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    path = next(folder.glob("*/model.onnx"))
    with pytest.raises(BundleError):
        OnnxRuntime(path, device="cpu", data=b"")
    assert OnnxRuntime(path, device="cpu", data=path.read_bytes())


def test_an_endless_graph_can_be_stopped_in_the_same_process(tmp_path: Path) -> None:
    folder = with_graph(tmp_path / "bundle", loop(2**62))
    started = time.monotonic()
    with pytest.raises(BundleError, match="can't be run"):
        open_predictor(folder, device="cpu", golden_seconds=0.5)
    assert time.monotonic() - started < 4


def test_a_time_limit_that_is_kept_stops_nothing(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    predictor = open_predictor(folder, device="cpu", golden_seconds=0.5)
    time.sleep(1)
    prepared = predictor.prepare(next(folder.glob("*/golden/0.jpg")).read_bytes())
    assert predictor.predict([prepared])


def varint(value: int) -> bytes:
    digits = b""
    while value >= 0x80:
        digits, value = digits + bytes([value & 0x7F | 0x80]), value >> 7
    return digits + bytes([value])


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",
        b"\x3a\x05\x00",  # a graph that is longer than the file
        b"\x3a" + varint(2**63),
        b"\x3a" + b"\xff" * 11,
        b"\x3b\x3c",  # a group
        b"\x38\x01",  # a graph that is a number
        b"\x00\x00",  # field 0
        varint(2**35) + b"\x00",
        b"\x00\x00\x00\x00ORTM" + bytes(100),
    ],
)
def test_what_is_no_protobuf_message_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="no ONNX file"):
        onnx_check.check(Path("model.onnx"), data)


@pytest.mark.process
def test_a_graph_of_nothing_but_fields_is_refused_in_seconds() -> None:
    data = b"\x3a" + varint(2 * 20_000_000) + b"\x50\x00" * 20_000_000
    started = time.process_time()
    with pytest.raises(BundleError, match="too many fields"):
        onnx_check.check(Path("model.onnx"), data)
    assert time.process_time() - started < 20


def test_deeply_nested_messages_take_no_recursion() -> None:
    data = b""
    for _ in range(300):  # attribute, graph, node and so on
        for key in (b"\x32", b"\x2a", b"\x0a"):
            data = key + varint(len(data)) + data
    onnx_check.check(Path("model.onnx"), b"\x3a" + varint(len(data)) + data)
