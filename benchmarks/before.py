"""An older checkout of Fledge as one more peer of the races: `before-fp32`, `before`.

An older checkout decodes all pixels, so it needs a bundle of its own where `--bundle` decodes at a
reduced size. This writes a copy of a run with another `preprocess.decode`, and prints the command
that exports it:

    python -m benchmarks.before runs/latest runs/full --checkout ../fledge-before
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
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
            f"--before-bundle {found.bundle}: decodes at a reduced size, which an older checkout "
            "can't; export a copy of the run: python -m benchmarks.before --help"
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


def main() -> int:
    """Copy a run with another `preprocess.decode`; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("copy", type=Path, help="a new folder")
    parser.add_argument("--decode", choices=("full", "scaled"), default="full")
    parser.add_argument("--checkout", type=Path, default=Path(), help="that will export it")
    options = parser.parse_args()
    if options.copy.exists():
        raise SystemExit(f"{options.copy} exists; name a new folder")
    shutil.copytree(options.run, options.copy)
    description = options.copy / "best.json"
    content = json.loads(description.read_text())
    # Older checkouts have neither field, and refuse those that they don't know.
    content["preprocess"].pop("decode", None)
    if content["preprocess"].get("fit") == "crop":
        del content["preprocess"]["fit"]
    if options.decode != "full":
        content["preprocess"]["decode"] = options.decode
    description.write_text(json.dumps(content, indent=2) + "\n")
    python, program = (options.checkout / name for name in (".venv/bin/python", "fledge.py"))
    command = [str(python), str(program), "export", str(options.copy), "--out"]
    print(shlex.join([*command, f"bundle-{options.decode}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
