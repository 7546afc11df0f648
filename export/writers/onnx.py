"""Write the graph as ONNX: one file, dynamic batch, labels inside, and nothing about this machine.

The exporter records a Python stack trace with file paths for every node. Those would leak where the
model was made and change its bytes from one place to another, so all metadata of nodes and values
goes; what is written depends on the graph and the versions of the packages alone.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import onnx
import torch

from export.graph import Graph, example
from serving.errors import WorkError
from serving.imaging.preprocess import Preprocess

OPSET: Final = 18
_LARGEST: Final = 2**31 - 2**24  # bytes of weights: protobuf's own limit, less room for the nodes


def write(
    graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
) -> None:
    """Export `graph` to `path`; name, labels and preprocess go into the file's metadata as JSON.

    Raises:
        WorkError: The exporter has no translation for part of the network, the weights are more
            than a file of this kind holds, or the file is no valid ONNX.
    """
    weights = sum(one.numel() * one.element_size() for one in graph.state_dict().values())
    if weights > _LARGEST:
        raise WorkError(
            f"the network can't be written as ONNX: its weights take {weights / 1e9:.1f} GB, and a "
            f"file holds {_LARGEST / 1e9:.1f}; choose a smaller arch"
        )
    save(_translate(graph, preprocess), path, name=name, labels=labels, preprocess=preprocess)


def save(
    model: onnx.ModelProto,
    path: Path,
    *,
    name: str,
    labels: Sequence[str],
    preprocess: Preprocess,
) -> None:
    """Check a graph and write it with these facts and no others; all as `write`."""
    _strip(model)
    facts = {"name": name, "labels": list(labels), "preprocess": preprocess.to_dict()}
    values = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in facts.items()
    }
    onnx.helper.set_model_props(model, values)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise WorkError(f"the ONNX graph is not valid: {_first_line(error)}") from error
    path.write_bytes(model.SerializeToString(deterministic=True))


def probe() -> bytes:
    """The least graph that is in the contract: to see whether a device runs any."""
    kind, shape = onnx.TensorProto, ["batch", "values"]
    nodes = [
        onnx.helper.make_node("Cast", ["pixels"], ["floats"], to=kind.FLOAT),
        onnx.helper.make_node("Flatten", ["floats"], ["features"]),
        onnx.helper.make_node("Relu", ["features"], ["logits"]),
    ]
    pixels = onnx.helper.make_tensor_value_info("pixels", kind.UINT8, ["batch", 8, 8, 3])
    gives = [
        onnx.helper.make_tensor_value_info(name, kind.FLOAT, shape)
        for name in ("logits", "features")
    ]
    graph = onnx.helper.make_graph(nodes, "probe", [pixels], gives)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def _translate(graph: Graph, preprocess: Preprocess) -> onnx.ModelProto:
    # A batch of 2 to trace with: at 1 the exporter would take the axis for a constant.
    pixels = example(preprocess, batch=2)
    try:
        with warnings.catch_warnings():
            # The exporter's own use of what Python and torch deprecate; nothing here can change it.
            for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", kind)
            program = torch.onnx.export(
                graph,
                (pixels,),
                dynamo=True,
                input_names=["pixels"],
                output_names=["logits", "features"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except RuntimeError as error:  # the base of every error of the exporter
        reason = _untranslated(graph, error) or _first_line(error)
        raise WorkError(f"the network can't be written as ONNX: {reason}") from error
    if program is None:  # only the exporter's type says that it may be
        raise WorkError("the network can't be written as ONNX: the exporter gave nothing")
    model: onnx.ModelProto = program.model_proto
    return model


def _untranslated(graph: Graph, error: BaseException | None) -> str | None:
    """Which operator of which module the exporter has no translation for, if it is that."""
    while error:
        found = re.search(r"OpOverload\(op='\w+\.(\w+)'", str(error))
        if found:
            where = _modules_with(graph, found[1])
            return f"no translation for {found[1]}, in {', '.join(where) or 'a module unknown'}"
        error = error.__cause__
    return None


def _modules_with(graph: Graph, operator: str) -> list[str]:
    """The modules, as the checkpoint names them, that call an operator under some such name."""

    def plain(name: str) -> str:
        return name.replace("_", "").lower()

    wanted = plain(operator)
    exact: list[str] = []
    like: list[str] = []
    for node in graph.core.graph.nodes:
        is_module = node.op == "call_module"
        called = graph.core.get_submodule(node.target) if is_module else node.target
        name = plain(
            type(called).__name__ if is_module else getattr(called, "__name__", str(called))
        )
        stack = node.meta.get("nn_module_stack") or {str(node.target): None}
        where = list(stack)[-1].removeprefix("classifier.")
        if name == wanted:
            exact.append(where)
        elif wanted in name or (len(name) > 3 and name in wanted):
            like.append(where)
    return list(dict.fromkeys(exact or like))


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about its own run: traces, paths, names of its passes."""
    holders = [model, *model.functions]
    for graph in _graphs(model.graph):
        holders += [graph, *graph.node, *graph.input, *graph.output]
        holders += [*graph.value_info, *graph.initializer]
    for function in model.functions:
        holders += [*function.node, *function.value_info]
    for holder in holders:
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
