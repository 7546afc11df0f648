"""The virtual environment with timm and transformers, and the run's network in their formats."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks import environments
from benchmarks.machine import PEERS_FOLDER

PINNED: Final = ("timm==1.0.31", "transformers==5.24.0")
REPORTED: Final = (
    *("onnxruntime-gpu", "onnxruntime", "torch", "torchvision", "timm", "transformers"),
    *("pillow", "numpy"),
)
"""Packages whose versions are reported with the results."""


def python() -> Path:
    """The interpreter of that environment, which is created at first use.

    Raises:
        SystemExit: pip failed; its own message is on stderr.
    """
    on_failure = (
        "timm and transformers could not be installed; leave them out by --peers "
        "fledge-fp32,limit-fp32,fledge,limit,torch, or name an interpreter that has them by "
        "--peers-python"
    )
    return environments.create_layered("score", PINNED, on_failure)


def convert_network(interpreter: Path, run: Path, folder: Path, env: Mapping[str, str]) -> Path:
    """Write the run's network for timm and transformers into `folder`, and check its logits.

    Raises:
        SystemExit: They have no such network; the program's own message is on stderr.
    """
    if (folder / "network.json").exists():  # written last
        return folder
    program = str(PEERS_FOLDER / "score_network.py")
    done = subprocess.run(
        [str(interpreter), program, str(run), "--out", str(folder)], env=dict(env), check=False
    )
    if done.returncode:
        raise SystemExit("leave timm and transformers out by --peers")
    return folder


def versions(interpreter: Path | None) -> list[str]:
    """Lines with the versions here and, where given, in the peers' environment."""
    lines = [f"here: {environments.versions(Path(sys.executable), REPORTED)}"]
    if interpreter:
        lines.append(f"timm, transformers: {environments.versions(interpreter, REPORTED)}")
    return lines
