"""Write the graph as TorchScript: traced, frozen, and with nothing about this machine in it.

`torch.jit.save` puts the Python stack of every operation beside the code, and numbers the class by
how many were traced before in the same process. Both go, so the same graph gives the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from export.graph import Graph, example
from serving.errors import WorkError
from serving.imaging.preprocess import Preprocess

_ALIGNMENT: Final = 64
"""Tensors in the archive start at multiples of this, so that libtorch may map them."""


def write(
    graph: Graph, path: Path, *, name: str, labels: Sequence[str], preprocess: Preprocess
) -> None:
    """Trace `graph` and save it; name, labels and preprocess become `extra` files as JSON.

    Raises:
        WorkError: The network can't be traced.
    """
    facts = {"name": name, "labels": list(labels), "preprocess": preprocess.to_dict()}
    extra = {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    archive = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        # TorchScript is deprecated as a whole; those who asked for the file know.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
        # Swin asks whether a window fits the map: the contract fixes the size, so once is enough.
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python")
        try:
            trace: Any = torch.jit.trace  # untyped in some releases
            # The gate compares far more than the tracer's own check would.
            traced = trace(graph, example(preprocess), check_trace=False)
            frozen = torch.jit.freeze(traced)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise WorkError(f"the network can't be written as TorchScript: {reason}") from error
        torch.jit.save(frozen, archive, _extra_files=extra)
    path.write_bytes(_clean(archive))


def _clean(archive: io.BytesIO) -> bytes:
    """The archive again without stack traces and without the number in the class's name."""
    out = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            if entry.filename.endswith((".debug_pkl", "/serialization_id")):
                continue  # the second is a hash of the file as it was
            data = old.read(entry)
            if entry.filename.endswith((".py", ".pkl")):
                data = re.sub(rb"\.___torch_mangle_\d+", b".___graph", data)
            name = re.sub(r"___torch_mangle_\d+\.py$", "___graph.py", entry.filename)
            info = zipfile.ZipInfo(name)  # its date is 1980
            info.extra = _padding(out.tell(), name)
            new.writestr(info, data)
    return out.getvalue()


def _padding(position: int, name: str) -> bytes:
    """An extra field that makes the data of an entry begin at a multiple of the alignment."""
    begin = position + 30 + len(name.encode()) + 4  # the local header is 30 bytes
    size = -begin % _ALIGNMENT
    return b"FB" + struct.pack("<H", size) + bytes(size)
