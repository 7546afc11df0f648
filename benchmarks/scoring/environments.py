"""The environment of timm and transformers, and the network in their shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.scoring.peers import PROGRAMS
from benchmarks.serving import environments

PINNED: Final = ("timm==1.0.31", "transformers==5.24.0")
SHOWN: Final = (
    *("onnxruntime-gpu", "onnxruntime", "torch", "torchvision", "timm", "transformers"),
    *("pillow", "numpy"),
)


def python() -> Path:
    """An interpreter that has both; made at first use.

    Raises:
        SystemExit: It can't be installed; pip has said why.
    """
    otherwise = (
        "timm and transformers could not be installed; leave them out by --peers "
        "fledge-fp32,limit-fp32,fledge,limit,torch, or name an interpreter that has them by "
        "--peers-python"
    )
    return environments.layered("score", PINNED, otherwise)


def network(interpreter: Path, run: Path, folder: Path, env: Mapping[str, str]) -> Path:
    """The run's network for timm and transformers, checked to be the same.

    Raises:
        SystemExit: They have no such network; the program has said why.
    """
    if (folder / "network.json").exists():  # it is written last
        return folder
    program = str(PROGRAMS / "score_network.py")
    made = subprocess.run(
        [str(interpreter), program, str(run), "--out", str(folder)], env=dict(env), check=False
    )
    if made.returncode:
        raise SystemExit("leave timm and transformers out by --peers")
    return folder


def versions(interpreter: Path | None) -> list[str]:
    """What runs here, and in the peers' environment."""
    found = [f"here: {environments.versions(Path(sys.executable), SHOWN)}"]
    if interpreter:
        found.append(f"timm, transformers: {environments.versions(interpreter, SHOWN)}")
    return found
