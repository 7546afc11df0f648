"""Output of `fledge cache`: what the disk cache holds, and what was removed from it."""

from __future__ import annotations

import time

from training.utils.disk_cache import DiskCache, abbreviate_home, format_size


def describe(cache: DiskCache) -> list[str]:
    """Return the output lines of `fledge cache`.

    The first line has the folder, size and size limit of the cache. Each further line describes an
    entry; the most recently used entry is first.
    """
    size, budget = format_size(cache.size()), format_size(cache.budget)
    lines = [f"{abbreviate_home(cache.folder)}: {size} of {budget}"]
    for entry in reversed(cache.entries()):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        lines.append(
            f"  {entry.path.name[:15]}…  {format_size(entry.size):>9}  last used {used}  "
            f"{entry.description}"
        )
    return lines


def clear(cache: DiskCache) -> list[str]:
    """Remove all entries, and return the output lines of `fledge cache --clear`.

    The first line has the size freed. Each further line names an entry that could not be removed.
    """
    freed, remaining = cache.clear()
    lines = [f"{format_size(freed)} freed in {abbreviate_home(cache.folder)}"]
    return lines + [
        f"  {entry.path.name[:15]}…  not removed: a run is using it, or permission is missing"
        for entry in remaining
    ]
