"""An environment for fastai, made once and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

FASTAI: Final = "2.8.12"


def python() -> Path:
    """The interpreter of an environment with fastai and the torch that runs here.

    Both sides then measure their own code, not two versions of torch. pip takes everything from
    wherever it is configured to.

    Raises:
        SystemExit: It can't be installed; pip has said why.
    """
    pair = [f"{name}=={_release(name)}" for name in ("torch", "torchvision")]
    name = "-".join([f"fastai-{FASTAI}", *(word.replace("==", "-") for word in pair)])
    folder = cache() / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = folder / "bin" / "python"
    done = folder / ".installed"
    if done.exists():
        return interpreter
    print(f"installing fastai {FASTAI} into {folder}, once", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if subprocess.run([*pip, f"fastai=={FASTAI}", *pair], check=False).returncode:
        raise SystemExit(
            "fastai could not be installed; leave it out by --peers fledge,torch, or name an "
            "interpreter that has it by --fastai-python"
        )
    done.touch()
    return interpreter


def _release(name: str) -> str:
    return metadata.version(name).partition("+")[0]


def cache() -> Path:
    """Where environments of the benchmarks lie."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fledge-benchmarks"
