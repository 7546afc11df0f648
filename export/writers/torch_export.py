"""Write the graph by `torch.export`, TorchScript's successor: `model.pt2`, and run it for the gate.

What the tracer notes of its own run (stack traces, source lines, names of files) goes, as from the
other graphs: the same graph gives the same bytes.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from export.graph import Graph, example
from serving.errors import WorkError
from serving.imaging.preprocess import Pixels, Preprocess
from serving.inference.runtime import Floats

_NOTES: Final = ("stack_trace", "source_fn_stack", "nn_module_stack", "torch_fn", "from_node")


def write(
    graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
) -> None:
    """Export `graph` and save it; name, labels and preprocess become extra files as JSON.

    Raises:
        WorkError: The network can't be exported.
    """
    facts = {"name": name, "labels": list(labels), "preprocess": preprocess.to_dict()}
    extra = {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    archive = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own use of what torch deprecates
            program = torch.export.export(
                graph,
                (example(preprocess),),
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            )
            for node in program.graph.nodes:
                for note in _NOTES:
                    node.meta.pop(note, None)
            torch.export.save(program, archive, extra_files=extra)
    except Exception as error:  # of many kinds, with no base of their own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WorkError(f"the network can't be written by torch.export: {reason}") from error
    path.write_bytes(archive.getvalue())


class ExportedRuntime:
    """`model.pt2` as a `serving.inference.runtime.Runtime`, for the gate: on the CPU."""

    provider = "torch.export"

    def __init__(self, path: Path) -> None:
        """Load a file that this process has just written."""
        self._module = torch.export.load(path).module()

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """As `OnnxRuntime.run`."""
        with torch.inference_mode():
            logits, features = self._module(torch.from_numpy(np.array(pixels)))
        return logits.numpy(), features.numpy()
