"""Build bundles with a hostile graph: the manifest, checksums and version fit the graph."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.bundle import storage
from serving.bundle.manifest import Manifest, content_version
from tests.support.tiny_bundle import tiny_bundle


def rewrite(folder: Path, name: str, data: bytes) -> Path:
    """Replace the content of a payload file, as its author would: with all checksums.

    Returns:
        The file.
    """
    old = storage.read(folder).manifest
    path = folder / old.version / name
    path.write_bytes(data)
    files = {**old.files, name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    manifest = old.model_copy(update={"files": files})
    digests = {graph: files[graph]["sha256"] for graph in manifest.graphs}
    manifest = manifest.model_copy(update={"version": content_version(manifest, digests)})
    (folder / old.version).rename(folder / manifest.version)
    storage.publish(manifest, folder)
    return folder / manifest.version / name


def with_graph(folder: Path, change: Callable[[Any], Any], **options: Any) -> Path:
    """Publish a tiny bundle whose ONNX model was changed by `change`; return the folder."""
    tiny_bundle(folder, **options)
    path = storage.read(folder).graph("fp32")
    model = onnx.load_model_from_string(path.read_bytes())
    changed = change(model)
    rewrite(folder, "model.onnx", (model if changed is None else changed).SerializeToString())
    return folder


def external(tensor: Any, location: str) -> None:
    """Move the data of a tensor into the file `location` of the current folder."""
    Path(location).write_bytes(tensor.raw_data)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": size}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def constant(name: str, value: float, location: str | None = None) -> Any:
    """A tensor [1] of a float."""
    import numpy as np

    tensor = numpy_helper.from_array(np.array([value], np.float32), name)
    if location:
        external(tensor, location)
    return tensor


def loop(turns: int) -> Callable[[Any], None]:
    """A change that adds a loop of that many turns to the computation of the features."""

    def change(model: Any) -> None:
        graph = model.graph
        info = helper.make_tensor_value_info
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go"], ["go_on"]),
                helper.make_node("Add", ["value", "nothing"], ["next"]),
            ],
            "body",
            [
                info("turn", TensorProto.INT64, []),
                info("go", TensorProto.BOOL, []),
                info("value", TensorProto.FLOAT, None),
            ],
            [info("go_on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, None)],
        )
        flatten = next(node for node in graph.node if node.op_type == "Flatten")
        flatten.output[0] = "flat"
        node = helper.make_node("Loop", ["turns", "yes", "flat"], ["features"], body=body)
        graph.node.insert(list(graph.node).index(flatten) + 1, node)
        graph.initializer.append(helper.make_tensor("turns", TensorProto.INT64, [], [turns]))
        graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        graph.initializer.append(helper.make_tensor("nothing", TensorProto.FLOAT, [], [0.0]))

    return change


def allocate(values: int) -> Callable[[Any], None]:
    """A change that makes the graph fill that many numbers, and add their least to the features."""

    def change(model: Any) -> None:
        graph = model.graph
        flatten = next(node for node in graph.node if node.op_type == "Flatten")
        flatten.output[0] = "flat"
        at = list(graph.node).index(flatten) + 1
        for node in (
            helper.make_node("Add", ["features", "least"], ["features2"]),
            helper.make_node("ReduceMin", ["many"], ["least"], keepdims=0),
            helper.make_node("Expand", ["zero", "shape"], ["many"]),
            helper.make_node("Sub", ["first", "first"], ["zero"]),
            helper.make_node("ReduceMin", ["flat"], ["first"], keepdims=0),
        ):
            graph.node.insert(at, node)
        for node in graph.node:
            for number, name in enumerate(node.output):
                node.output[number] = {"features2": "features"}.get(name, name)
            if node.op_type == "Add":
                node.input[0] = "flat"
        graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [1], [values]))

    return change


def fifo(path: Path) -> None:
    """Replace a file by a FIFO without a writer."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def in_place_of(folder: Path, other: Path, manifest: Manifest | None = None) -> None:
    """Publish the bundle `other` in `folder`, as an export does: the payload, then the manifest."""
    manifest = manifest or storage.read(other).manifest
    target = folder / manifest.version
    if not target.exists():
        # Not `copytree`, which would wait for the writer of a FIFO.
        (other / manifest.version).rename(target)
    storage.publish(manifest, folder)
