"""The virtual environment with FastAPI and LitServe."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks import environments

PINNED: Final = ("fastapi==0.165.0", "litserve==0.2.19")
REPORTED: Final = (
    *("bentoml", "fastapi", "litserve", "starlette", "uvicorn", "uvloop", "httptools"),
    *("onnxruntime-gpu", "onnxruntime", "torch", "torchvision", "pillow", "numpy"),
)
"""Packages whose versions are reported with the results."""


def python() -> Path:
    """The interpreter of that environment, which is created at first use.

    torch, ONNX Runtime, Pillow, uvicorn and BentoML are those of the running interpreter.

    Raises:
        SystemExit: pip failed; its own message is on stderr.
    """
    on_failure = (
        "FastAPI and LitServe could not be installed; leave them out by --peers "
        "fledge-fp32,fledge,bentoml,bentoml-batch,limit-fp32,limit, or name an interpreter "
        "that has them by --peers-python"
    )
    return environments.create_layered("serve", PINNED, on_failure)
