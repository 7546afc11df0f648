"""Write the graph as TorchScript: traced, frozen, and without data about this machine.

`torch.jit.save` also writes the Python stack of every operation, and class names with a number that
depends on how many modules the process has traced. Both are removed: the same graph must give the
same bytes.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from export.graph import Graph, example
from export.writers.metadata import metadata
from serving.errors import WorkError
from serving.imaging.preprocess import Preprocess

_ALIGNMENT: Final = 64
"""Tensors in the archive start at multiples of this many bytes, so that libtorch can map them."""


def write(
    graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
) -> None:
    """Trace `graph` and save it; name, labels and preprocessing are stored as JSON extra files.

    Raises:
        WorkError: The network can't be traced.
    """
    archive = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        # All of TorchScript is deprecated; the file is written for runtimes that still need it.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
        # Swin branches on the size of the feature map, which the graph contract fixes.
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python")
        try:
            trace: Any = torch.jit.trace  # untyped in some releases
            # The parity gate compares more than the tracer's own check does.
            traced = trace(graph, example(preprocess), check_trace=False)
            frozen = torch.jit.freeze(traced)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise WorkError(f"the network can't be written as TorchScript: {reason}") from error
        torch.jit.save(frozen, archive, _extra_files=metadata(name, labels, preprocess))
    path.write_bytes(_clean(archive))


def _clean(archive: io.BytesIO) -> bytes:
    """Return a copy of the archive without stack traces and without the numbers in class names."""
    out = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            if entry.filename.endswith((".debug_pkl", "/serialization_id")):
                continue  # serialization_id is a hash of the original archive
            data = old.read(entry)
            if entry.filename.endswith((".py", ".pkl")):
                data = re.sub(rb"\.___torch_mangle_\d+", b".___graph", data)
            name = re.sub(r"___torch_mangle_\d+\.py$", "___graph.py", entry.filename)
            info = zipfile.ZipInfo(name)  # dated 1980
            info.extra = _padding(out.tell(), name)
            new.writestr(info, data)
    return out.getvalue()


def _padding(position: int, name: str) -> bytes:
    """Return a zip extra field that makes the entry's data begin at a multiple of the alignment."""
    begin = position + 30 + len(name.encode()) + 4  # 30: local file header; 4: extra field's header
    size = -begin % _ALIGNMENT
    return b"FB" + struct.pack("<H", size) + bytes(size)
