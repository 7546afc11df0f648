"""An environment for the peers, made once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.training.fastai_env import cache

PINNED: Final = ("fastapi==0.165.0", "litserve==0.2.19")
SHOWN: Final = (
    *("bentoml", "fastapi", "litserve", "starlette", "uvicorn", "uvloop", "httptools"),
    *("onnxruntime-gpu", "onnxruntime", "torch", "torchvision", "pillow", "numpy"),
)


def python() -> Path:
    """The interpreter of an environment with FastAPI and LitServe, behind it all that is here.

    torch, ONNX Runtime, Pillow, uvicorn and BentoML are those of this very environment.

    Raises:
        SystemExit: It can't be installed; pip has said why.
    """
    otherwise = (
        "FastAPI and LitServe could not be installed; leave them out by --peers "
        "fledge-fp32,fledge,bentoml,bentoml-batch,limit-fp32,limit, or name an interpreter "
        "that has them by --peers-python"
    )
    return layered("serve", PINNED, otherwise)


def layered(name: str, pins: Sequence[str], otherwise: str) -> Path:
    """The interpreter of an environment with `pins`, behind it all that is here.

    All sides then run the same torch and the same Pillow, and nothing large is installed twice.
    pip takes the rest from wherever it is configured to.

    Raises:
        SystemExit: It can't be installed; pip has said why, and `otherwise` says what to do.
    """
    behind = sysconfig.get_path("purelib")
    mark = hashlib.sha256(behind.encode()).hexdigest()[:8]  # of another environment, another one
    name = "-".join([name, *(pin.replace("==", "-") for pin in pins), mark])
    folder = cache() / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = folder / "bin" / "python"
    done = folder / ".installed"
    if done.exists():
        return interpreter
    print(f"installing {', '.join(pins)} into {folder}, once", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "behind.pth").write_text(f"{behind}\n")
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if subprocess.run([*pip, *pins], check=False).returncode:
        raise SystemExit(otherwise)
    done.touch()
    return interpreter


def versions(interpreter: Path, shown: Sequence[str] = SHOWN) -> str:
    """What an interpreter has of all that matters, in words."""
    code = (
        "import sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "print('Python', sys.version.split()[0], end='')\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(',', name, version(name), end='')\n"
        "    except PackageNotFoundError: pass\n"
    )
    told = subprocess.run(
        [str(interpreter), "-c", code, *shown], capture_output=True, text=True, check=True
    )
    return told.stdout
