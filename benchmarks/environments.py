"""Virtual environments for the peers' packages, created once in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


def cache_folder() -> Path:
    """The folder that holds the benchmarks' virtual environments."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fledge-benchmarks"


def create(name: str, pins: Sequence[str], on_failure: str, base: str = "") -> Path:
    """Create a virtual environment with `pins`, or reuse it; returns its interpreter.

    Args:
        name: Of its folder, without the Python version.
        pins: Requirements as `package==version`, installed by pip from its configured index.
        on_failure: The error text: what to do without this environment.
        base: A site-packages folder whose packages the environment sees behind its own.

    Raises:
        SystemExit: pip failed; its own message is on stderr.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_folder() / f"{name}-py{version}"
    interpreter = folder / "bin" / "python"
    complete = folder / ".installed"
    if complete.exists():
        return interpreter
    print(f"installing {', '.join(pins)} into {folder}, once", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if base:
        packages = folder / "lib" / f"python{version}" / "site-packages"
        (packages / "base.pth").write_text(f"{base}\n")
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if subprocess.run([*pip, *pins], check=False).returncode:
        raise SystemExit(on_failure)
    complete.touch()
    return interpreter


def create_layered(name: str, pins: Sequence[str], on_failure: str) -> Path:
    """Create an environment with `pins` on top of the packages of the running interpreter.

    All competitors then run the same torch and the same Pillow, and no large package is installed
    twice.

    Raises:
        SystemExit: pip failed; its own message is on stderr.
    """
    base = sysconfig.get_path("purelib")
    digest = hashlib.sha256(base.encode()).hexdigest()[:8]  # one environment for each base
    name = "-".join([name, *(pin.replace("==", "-") for pin in pins), digest])
    return create(name, pins, on_failure, base)


def versions(interpreter: Path, packages: Sequence[str]) -> str:
    """Python's version and those of the installed `packages`, separated by commas."""
    code = (
        "import sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "print('Python', sys.version.split()[0], end='')\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(',', name, version(name), end='')\n"
        "    except PackageNotFoundError: pass\n"
    )
    done = subprocess.run(
        [str(interpreter), "-c", code, *packages], capture_output=True, text=True, check=True
    )
    return done.stdout
