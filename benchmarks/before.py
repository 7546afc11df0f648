"""An older checkout of Fledge as one more peer of the races: `before-fp32`, `before`."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NAMES: Final = ("before-fp32", "before")
"""The peers that run in the older checkout; they take part if --before is given."""


@dataclass(frozen=True)
class Checkout:
    """An older Fledge: its folder, with an environment in .venv, and the bundle that it opens."""

    folder: Path
    bundle: Path

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return self.folder / ".venv" / "bin" / "python"

    @property
    def values(self) -> dict[str, object]:
        """What the fields of a command's template stand for."""
        folder, bundle = self.folder, self.bundle
        return {"before": folder, "before_python": self.python, "before_bundle": bundle}

    def describe(self) -> str:
        """Its commit, if it is a git checkout, and its bundle; one line."""
        command = ["git", "-C", str(self.folder), "log", "-1", "--format=%h of %cs, %s"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        manifest = json.loads((self.bundle / "manifest.json").read_text())
        bundle = f"bundle {manifest['name']}:{manifest['version']}"
        return f"before: {done.stdout.strip() or 'no git checkout'}; {bundle}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """--before and --before-bundle."""
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help=f"an older checkout after `make install`: adds the peers {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--before-bundle",
        type=Path,
        metavar="DIR",
        help="the same network for it, decoded in full; default: --bundle",
    )


def of(options: argparse.Namespace) -> Checkout | None:
    """The checkout of --before; None without it.

    Raises:
        SystemExit: It has no environment, or can't open the bundle.
    """
    if not options.before:
        return None
    found = Checkout(options.before.resolve(), (options.before_bundle or options.bundle).resolve())
    if not (found.python.exists() and (found.folder / "fledge.py").exists()):
        raise SystemExit(
            f"--before {options.before}: no fledge.py and .venv; run `make install` there"
        )
    manifest = json.loads((found.bundle / "manifest.json").read_text())
    if manifest["preprocess"].get("decode", "full") != "full":
        raise SystemExit(
            f"--before-bundle {found.bundle}: decodes at a reduced size, which the older checkout "
            "can't; name a bundle of the same network with preprocess.decode = full"
        )
    return found


def default_peers(known: Iterable[str], checkout: Path | None) -> str:
    """The value of --peers that stands for all: those of the older checkout only with --before."""
    return ",".join(name for name in known if checkout or name not in NAMES)


def require(names: Sequence[str], checkout: Path | None) -> None:
    """Refuse the peers of an older checkout without one.

    Raises:
        SystemExit: --before is missing.
    """
    if not checkout and (missing := [name for name in names if name in NAMES]):
        raise SystemExit(f"--peers {','.join(missing)}: name an older checkout, --before CHECKOUT")
