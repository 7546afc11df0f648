"""What a fuzz target is, and the list of all targets."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MAX_LENGTH = 65_536
"""Bytes of the longest input."""

Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A parser, and how inputs for it are made.

    Attributes:
        name: Name on the command line.
        check: Runs the parser on one input. The current directory is the target's folder, the only
            one that may be read or written. May raise errors of `serving.errors`, and no others.
        seeds: Function that builds small inputs, most of them valid.
        mutate: Changes an input by its structure, for example one field of a tar header. None: only
            bytes are changed.
        repair: Makes an input pass checksums, after bytes were changed. None: it has none.
        prepare: Called once, in the target's folder, before the first input: imports, fixed files.
        words: Dictionary: byte strings that are inserted.
    """

    name: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutate | None = None
    repair: Callable[[bytes], bytes] | None = None
    prepare: Callable[[], None] = lambda: None
    words: tuple[bytes, ...] = ()


def put(path: Path, data: bytes | None) -> None:
    """Replace a file, or remove it (None). Truncating an open file would be slower on ext4."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


_MODULES = {
    "decode": "images",
    "plugin": "images",
    "profile": "images",
    "form": "requests",
    "json": "requests",
    "request": "requests",
    "manifest": "bundles",
    "signature": "bundles",
    "tar": "archives",
    "compressed": "archives",
    "zip": "archives",
    "list": "lists",
    "parquet": "lists",
    "scores": "tables",
    "labels": "tables",
    "table": "tables",
    "recipe": "recipes",
    "formula": "recipes",
    "run": "runs",
    "checkpoint": "runs",
    "state": "runs",
    "journal": "journals",
}
"""Name of a target -> module of `tests.fuzz.targets` that defines it in `TARGETS`."""

NAMES = tuple(_MODULES)


def load(name: str) -> Target:
    """Return the target of a name; imports only the packages that it needs."""
    module = importlib.import_module(f"tests.fuzz.targets.{_MODULES[name]}")
    return next(target for target in module.TARGETS if target.name == name)
