"""What a measurement was made on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
# What the shell of whoever measures has set for other services is not for these.
_FOREIGN: Final = ("FLEDGE_", "BENTOML_", "UVICORN_", "PEER_", "LIT", "WEB_CONCURRENCY")
FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def keep_to(threads: int) -> None:
    """Let this process and all that it starts use `threads` cores and as many threads."""
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        if threads > len(mine):
            raise SystemExit(f"--threads {threads}: this machine lends {len(mine)} cores")
        os.sched_setaffinity(0, mine[:threads])
    os.environ.update({name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})


def environment() -> dict[str, str]:
    """Variables for every competitor alike: ours to import, all on the CPU, nobody calls home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }


def describe(threads: int, device: str) -> str:
    """Processor, cores, instruction sets that matter, memory, GPU, system; one line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    known = set((re.search(r"^flags\s*: (.*)$", text, re.MULTILINE) or ["", ""])[1].split())
    flags = [flag for flag in FLAGS if flag in known]
    parts = [f"{name}, {threads} of {os.cpu_count()} cores"]
    parts += [" ".join(flags)] if flags else []
    parts += [f"{_memory():.0f} GiB"]
    if device == "cuda":
        parts += [_gpu()]
    return ", ".join([*parts, f"{platform.system()} {platform.release()}"])


def same(values: Mapping[str, str], path: Path, what: str) -> None:
    """Keep the settings of a measurement in a file, and refuse to mix those of two.

    Raises:
        SystemExit: The file has others; `what` names what lies beside it.
    """
    if not path.exists():
        path.write_text(json.dumps(values, indent=2) + "\n")
    before = json.loads(path.read_text())
    changed = [key for key in values if values[key] != before.get(key)]
    if changed:
        told = ", ".join(f"{key} was {before.get(key)} and is {values[key]}" for key in changed)
        raise SystemExit(f"{path.parent} holds other {what}: {told}; choose another --out")


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "GPU unknown"
