"""Number of CPU cores that this process may use, from its affinity and its container's quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CGROUP_MOUNT: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")


def cores() -> int:
    """Return the number of CPU cores that this process may use, at least 1.

    A quota that is not a whole number is rounded up: 1.5 cores count as 2.
    """
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        usable = os.cpu_count() or 1
    return max(1, min([usable, *map(math.ceil, quotas())]))


def quotas(own: Path = _OWN_CGROUP, mount: Path = _CGROUP_MOUNT) -> Iterator[float]:
    """Yield the CPU quota, in cores, of this process's control group and of every parent group.

    Groups without a quota are left out. Control groups version 2 store the quota in `cpu.max`,
    version 1 in `cpu/cpu.cfs_quota_us` and `cpu/cpu.cfs_period_us`.

    Args:
        own: File that contains the path of this process's control group, relative to `mount`. In a
            container, the folder of this path may be missing; folders that exist are still read.
        mount: Folder where the control groups are mounted. In a container, this folder has the
            quota of the container.
    """
    for folder in control_groups("cpu", own, mount):
        quota = _quota(folder)
        if quota is not None:
            yield quota


def control_groups(
    controller: str, own: Path = _OWN_CGROUP, mount: Path = _CGROUP_MOUNT
) -> Iterator[Path]:
    """Yield the folders of this process's control group and of every parent group.

    Args:
        controller: Name of the controller, such as "cpu" or "memory".
        own, mount: As `quotas`.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder
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
    return cores if cores > 0 else None  # version 1 writes -1 for no limit
