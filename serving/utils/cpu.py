"""How many cores this process may use: its affinity, cut by the CPU quota of its container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MOUNT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")


def cores() -> int:
    """At least 1; a quota of 1.5 counts as 2."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        usable = os.cpu_count() or 1
    return max(1, min([usable, *map(math.ceil, quotas())]))


def quotas(own: Path = _OWN, mount: Path = _MOUNT) -> Iterator[float]:
    """Cores that the control group of this process grants, and each group above that it can see.

    Groups without a limit are left out. Version 2 keeps it in `cpu.max`, version 1 in
    `cpu/cpu.cfs_quota_us` and `cpu/cpu.cfs_period_us`. A container sees its own group as the top,
    whatever `own` calls it.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / "cpu" if controllers else mount
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            quota = _quota(folder)
            if quota is not None:
                yield quota
            if folder == top:
                break


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max"
        return None
    return cores if cores > 0 else None  # -1 is version 1's word for none
