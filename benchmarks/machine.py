"""The machine of a measurement: description, core affinity, environment variables, settings."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PEERS_FOLDER: Final = ROOT / "benchmarks" / "peers"
"""Programs of the peers; run as files, some in other virtual environments."""
# Settings of other services in the caller's shell must not reach the measured ones.
_EXCLUDED: Final = ("FLEDGE_", "BENTOML_", "UVICORN_", "PEER_", "LIT", "WEB_CONCURRENCY")
FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def limit_cores(threads: int) -> None:
    """Restrict this process and its children to `threads` cores and as many threads."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        if threads > len(available):
            raise SystemExit(f"--threads {threads}: only {len(available)} cores are available")
        os.sched_setaffinity(0, available[:threads])
    os.environ.update({name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})


def environment(root: Path = ROOT) -> dict[str, str]:
    """Variables of every competitor: the checkout `root` importable, no GPU, no telemetry."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(_EXCLUDED)
    }
    return {
        **inherited,
        "PYTHONPATH": str(root),
        "CUDA_VISIBLE_DEVICES": "",
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }


def command(module: str) -> str:
    """The command line that started this benchmark, to be printed with its results."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def describe(threads: int, device: str) -> str:
    """Processor, cores, relevant instruction sets, memory, GPU, operating system; one line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    supported = set((re.search(r"^flags\s*: (.*)$", text, re.MULTILINE) or ["", ""])[1].split())
    flags = [flag for flag in FLAGS if flag in supported]
    parts = [f"{name}, {threads} of {os.cpu_count()} cores"]
    parts += [" ".join(flags)] if flags else []
    parts += [f"{_memory():.0f} GiB"]
    if device == "cuda":
        parts += [_gpu()]
    return ", ".join([*parts, f"{platform.system()} {platform.release()}"])


def require_same_settings(values: Mapping[str, str], path: Path, what: str) -> None:
    """Write the settings of a measurement to `path`, or compare them with those in it.

    Results of different settings must not be mixed in one folder.

    Raises:
        SystemExit: The file has other settings; `what` names the results beside it.
    """
    if not path.exists():
        path.write_text(json.dumps(values, indent=2) + "\n")
    before = json.loads(path.read_text())
    changed = [key for key in values if values[key] != before.get(key)]
    if changed:
        changes = ", ".join(f"{key} was {before.get(key)} and is {values[key]}" for key in changed)
        raise SystemExit(f"{path.parent} holds other {what}: {changes}; choose another --out")


def require_crop(bundle: Path) -> None:
    """Refuse a bundle for which the peers and the reference would do other work.

    Raises:
        SystemExit: Its `preprocess.fit` is not "crop"; the peers cut the centre square.
    """
    fit = json.loads((bundle / "manifest.json").read_text())["preprocess"].get("fit", "crop")
    if fit != "crop":
        raise SystemExit(
            f"--bundle {bundle}: its preprocess.fit is {fit}, and the peers cut the centre square; "
            "name a bundle that does"
        )


def _memory() -> float:
    """Physical memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "GPU unknown"
