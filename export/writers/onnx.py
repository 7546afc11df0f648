"""Write the graph as ONNX: one file with a dynamic batch axis and the labels in its metadata.

PyTorch's exporter records a Python stack trace with file paths for every node. The paths would
reveal directories of this machine and make the bytes differ between machines. All metadata of nodes
and values is therefore removed. The bytes depend only on the graph and on package versions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import onnx
import torch

from export.graph import Graph, example
from export.writers.metadata import metadata
from serving.errors import WorkError
from serving.imaging.preprocess import Preprocess

OPSET: Final = 18
_MAX_BYTES: Final = 2**31 - 2**24  # of weights: protobuf's limit minus a reserve for the nodes


def write(
    graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
) -> None:
    """Export `graph` to `path`; name, labels and preprocessing are stored in the file's metadata.

    Raises:
        WorkError: The exporter has no translation for an operator, the weights exceed the file
            format's limit, or the result is not valid ONNX.
    """
    weights = sum(one.numel() * one.element_size() for one in graph.state_dict().values())
    if weights > _MAX_BYTES:
        raise WorkError(
            f"the network can't be written as ONNX: its weights take {weights / 1e9:.1f} GB, and a "
            f"file holds {_MAX_BYTES / 1e9:.1f}; choose a smaller arch"
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
    """Check an ONNX graph and write it to `path`.

    All its metadata is removed, and then name, labels and preprocessing are stored as metadata.

    Raises:
        WorkError: The graph is not valid ONNX.
    """
    _remove_metadata(model)
    # In ONNX the name is plain text; in the other two file formats it is JSON.
    onnx.helper.set_model_props(model, metadata(name, labels, preprocess) | {"name": name})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise WorkError(f"the ONNX graph is not valid: {_first_line(error)}") from error
    path.write_bytes(model.SerializeToString(deterministic=True))


def probe() -> bytes:
    """Return a minimal ONNX graph, to test whether a device can run graphs.

    Its input and outputs have the names and dtypes of an exported graph.
    """
    kind, shape = onnx.TensorProto, ["batch", "values"]
    nodes = [
        onnx.helper.make_node("Cast", ["pixels"], ["floats"], to=kind.FLOAT),
        onnx.helper.make_node("Flatten", ["floats"], ["features"]),
        onnx.helper.make_node("Relu", ["features"], ["logits"]),
    ]
    pixels = onnx.helper.make_tensor_value_info("pixels", kind.UINT8, ["batch", 8, 8, 3])
    outputs = [
        onnx.helper.make_tensor_value_info(name, kind.FLOAT, shape)
        for name in ("logits", "features")
    ]
    graph = onnx.helper.make_graph(nodes, "probe", [pixels], outputs)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def _translate(graph: Graph, preprocess: Preprocess) -> onnx.ModelProto:
    # Traced with a batch of 2, because the exporter treats a batch axis of size 1 as a constant.
    pixels = example(preprocess, batch=2)
    try:
        with warnings.catch_warnings():
            # The exporter itself uses deprecated functions of Python and torch.
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
    except RuntimeError as error:  # the base class of the exporter's errors
        reason = _unsupported_operator(graph, error) or _first_line(error)
        raise WorkError(f"the network can't be written as ONNX: {reason}") from error
    if program is None:  # only for the type checker
        raise WorkError("the network can't be written as ONNX: the exporter returned nothing")
    model: onnx.ModelProto = program.model_proto
    return model


def _unsupported_operator(graph: Graph, error: BaseException | None) -> str | None:
    """Describe the operator that the exporter can't translate, and the modules that use it.

    Returns None if the error has another cause.
    """
    while error:
        match = re.search(r"OpOverload\(op='\w+\.(\w+)'", str(error))
        if match:
            modules = ", ".join(_modules_with(graph, match[1])) or "an unknown module"
            return f"no translation for {match[1]}, in {modules}"
        error = error.__cause__
    return None


def _modules_with(graph: Graph, operator: str) -> list[str]:
    """Return names of the modules that call an operator with this or a similar name."""

    def plain(name: str) -> str:
        return name.replace("_", "").lower()

    searched = plain(operator)
    exact: list[str] = []
    similar: list[str] = []
    for node in graph.core.graph.nodes:
        is_module = node.op == "call_module"
        called = graph.core.get_submodule(node.target) if is_module else node.target
        name = plain(
            type(called).__name__ if is_module else getattr(called, "__name__", str(called))
        )
        stack = node.meta.get("nn_module_stack") or {str(node.target): None}
        module = list(stack)[-1].removeprefix("classifier.")
        if name == searched:
            exact.append(module)
        elif searched in name or (len(name) > 3 and name in searched):
            similar.append(module)
    return list(dict.fromkeys(exact or similar))


def _remove_metadata(model: onnx.ModelProto) -> None:
    """Remove the exporter's records of the export: stack traces, paths, names of passes."""
    protos = [model, *model.functions]
    for graph in _graphs(model.graph):
        protos += [graph, *graph.node, *graph.input, *graph.output]
        protos += [*graph.value_info, *graph.initializer]
    for function in model.functions:
        protos += [*function.node, *function.value_info]
    for proto in protos:
        proto.ClearField("metadata_props")
        proto.ClearField("doc_string")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and, recursively, the subgraphs of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
