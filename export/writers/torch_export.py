"""Write the graph with `torch.export` as `model.pt2`, and run that file for the parity gate.

The parity gate compares the file's probabilities with the checkpoint's. Metadata of the tracing
(stack traces, source lines, file names) is removed: the same graph must give the same bytes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from export.graph import Graph, example
from export.writers.metadata import metadata
from serving.errors import WorkError
from serving.imaging.preprocess import Pixels, Preprocess
from serving.inference.runtime import Floats

_TRACING_METADATA: Final = (
    "stack_trace",
    "source_fn_stack",
    "nn_module_stack",
    "torch_fn",
    "from_node",
)


def write(
    graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
) -> None:
    """Export `graph` to `path`; name, labels and preprocessing are stored as JSON extra files.

    Raises:
        WorkError: The network can't be exported.
    """
    extra = metadata(name, labels, preprocess)
    archive = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter itself uses deprecated functions
            program = torch.export.export(
                graph,
                (example(preprocess),),
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            )
            for node in program.graph.nodes:
                for key in _TRACING_METADATA:
                    node.meta.pop(key, None)
            torch.export.save(program, archive, extra_files=extra)
    except Exception as error:  # the exporter's exceptions have no common base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WorkError(f"the network can't be written by torch.export: {reason}") from error
    path.write_bytes(archive.getvalue())


class ExportedRuntime:
    """A runtime that runs `model.pt2` on the CPU, for the comparison with the checkpoint."""

    provider = "torch.export"

    def __init__(self, path: Path) -> None:
        """Load the file.

        Only load files that this process wrote, because loading can execute code in the file.
        """
        self._module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """Compute logits [N, classes] and features [N, D] of pixels, uint8 [N, size, size, 3]."""
        with torch.inference_mode():
            logits, features = self._module(torch.from_numpy(np.array(pixels)))
        return logits.numpy(), features.numpy()
