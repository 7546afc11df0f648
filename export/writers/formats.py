"""The file formats that the float32 graph is written in besides ONNX: TorchScript, torch.export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from export.graph import Graph
from export.writers import torch_export, torchscript
from serving.imaging.preprocess import Preprocess
from serving.inference.runtime import Runtime
from serving.inference.torchscript import TorchScriptRuntime


class Write(Protocol):
    """A function that writes a graph to a file, with facts about the model inside."""

    def __call__(
        self, graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
    ) -> None: ...


class GraphFormat(NamedTuple):
    """A file format.

    Attributes:
        name: Name of the format in the parity report.
        file: Name of the file in the bundle.
        field: The manifest's field that has the file's name.
        write: Function that writes the graph.
        open: Function of the file's path that returns a runtime for the parity gate.
    """

    name: str
    file: str
    field: str
    write: Write
    open: Callable[[Path], Runtime]


TORCHSCRIPT: Final = GraphFormat(
    name="torchscript",
    file="model.ts",
    field="torchscript",
    write=torchscript.write,
    open=partial(TorchScriptRuntime, device="cpu"),
)
TORCH_EXPORT: Final = GraphFormat(
    name="torch.export",
    file="model.pt2",
    field="torch_export",
    write=torch_export.write,
    open=torch_export.ExportedRuntime,
)
FORMATS: Final = (TORCHSCRIPT, TORCH_EXPORT)
