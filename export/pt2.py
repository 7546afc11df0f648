"""Write the graph by `torch.export`, TorchScript's successor: `model.pt2`.

What the tracer notes of its own run (stack traces, source lines) goes, as from the other graphs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from export.graph import Graph, example
from serving.errors import WorkError
from serving.preprocess import Pixels, Preprocess
from serving.runtime import Floats

_NOTES = ("stack_trace", "source_fn_stack", "nn_module_stack", "torch_fn", "from_node")


def write(
    graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
) -> None:
    """Export `graph` and save it; name, labels and preprocess become extra files as JSON.

    Raises:
        WorkError: The network can't be exported.
    """
    facts = {"name": name, "labels": list(labels), "preprocess": preprocess.to_dict()}
    extra = {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own use of what torch deprecates
            program = torch.export.export(
                graph, (example(preprocess),), dynamic_shapes={"pixels": {0: batch}}
            )
            for node in program.graph.nodes:
                for note in _NOTES:
                    node.meta.pop(note, None)
            torch.export.save(program, path, extra_files=extra)
    except Exception as error:  # of many kinds, with no base of their own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WorkError(f"the network can't be written by torch.export: {reason}") from error


class ExportedRuntime:
    """`model.pt2` as a `serving.runtime.Runtime`, for the gate: on the CPU."""

    provider = "torch.export"

    def __init__(self, path: Path) -> None:
        """Load a file that this process has just written."""
        self._module = torch.export.load(path).module()

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """As `OnnxRuntime.run`."""
        with torch.inference_mode():
            logits, features = self._module(torch.from_numpy(np.array(pixels)))
        return logits.numpy(), features.numpy()
