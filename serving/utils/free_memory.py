"""Number of bytes that this process can still allocate on this machine or in its container."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

_CGROUP_MOUNT: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")


def free_memory(own: Path = _OWN_CGROUP, mount: Path = _CGROUP_MOUNT) -> int:
    """Return the free memory, in bytes, of the machine or of its tightest control group.

    Args:
        own: File that contains the path of this process's control group; see `cpu.quotas`.
        mount: Folder where the control groups are mounted.
    """
    free = [int(psutil.virtual_memory().available)]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mount / "memory" if controllers else mount
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left(folder)
            if left is not None:
                free.append(left)
            if folder == top:
                break
    return max(0, min(free))


def _left(folder: Path) -> int | None:
    """Return the free bytes of a control group, or None if it has no limit."""
    v2 = (folder / "memory.max").exists()
    limit, used = (
        ("memory.max", "memory.current")
        if v2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        # The kernel drops these pages of files when memory is needed.
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name == ("inactive_file" if v2 else "total_inactive_file"):
                left += int(size)
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return left
