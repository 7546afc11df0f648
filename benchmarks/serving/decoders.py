"""Time and memory of JPEG decoders, from the bytes of a photo to the network's square of uint8.

    python -m benchmarks.serving.decoders --photos flowers17

Photos of 0.2, 2, 12 and 48 megapixels are made from the given ones. Each decoder has a process of
its own on the same core, and they take turns: in each round each decodes each photo. Packages other
than Pillow and torch get a virtual environment each, which is created at first use; what it holds
is the size of the package. One that can't be installed or loaded is named with the reason.

The tables have the median CPU times with the ratio of Pillow's draft to them within a round, the
mean absolute difference from decoding all pixels, and the peak memory of one decoding in a fresh
process above the memory before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import environments, machine, photos, results
from benchmarks.machine import PEERS_FOLDER
from benchmarks.scoring.photos import find, spread

SIDES: Final = {"0.2": (516, 387), "2": (1632, 1224), "12": (4032, 3024), "48": (8064, 6048)}
"""Width and height by megapixels."""
REFERENCE: Final = "pillow"
DRAFT: Final = "pillow-draft2"


@dataclass(frozen=True)
class Decoder:
    """One way to decode. pins: packages of its own environment. packages: whose size is told."""

    title: str
    pins: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("pillow",)


DECODERS: Final = {
    "pillow": Decoder("Pillow, all pixels"),
    "pillow-gap3": Decoder("Pillow, all pixels, `reducing_gap=3`"),
    "pillow-gap2": Decoder("Pillow, all pixels, `reducing_gap=2`"),
    "pillow-draft2": Decoder("Pillow, draft, at least 2 times"),
    "pillow-draft1.5": Decoder("Pillow, draft, at least 1.5 times"),
    "pillow-draft1": Decoder("Pillow, draft, at least 1 time"),
    "fledge-full": Decoder("Fledge, `decode = full`"),
    "fledge-scaled": Decoder("Fledge, `decode = scaled`"),
    "simplejpeg": Decoder("simplejpeg", ("simplejpeg==1.9.0",), ("simplejpeg",)),
    "pyturbojpeg": Decoder("PyTurboJPEG", ("PyTurboJPEG==2.6.1",), ("PyTurboJPEG",)),
    "pyvips": Decoder(
        "pyvips, `shrink`",
        ("pyvips==3.2.0", "pyvips-binary==8.18.7"),
        ("pyvips", "pyvips-binary"),
    ),
    "pyvips-thumbnail": Decoder(
        "pyvips, `thumbnail_buffer`",
        ("pyvips==3.2.0", "pyvips-binary==8.18.7"),
        ("pyvips", "pyvips-binary"),
    ),
    "imagecodecs": Decoder("imagecodecs", ("imagecodecs==2026.3.6",), ("imagecodecs",)),
    "torchvision": Decoder("torchvision.io", (), ("torch", "torchvision")),
    "torchcodec": Decoder("torchcodec", ("torchcodec==0.17.0",), ("torch", "torchcodec")),
}


@dataclass
class Measured:
    """What is known of a decoder.

    Attributes:
        times: By megapixels, milliseconds of CPU time by round.
        differences: By megapixels, mean absolute differences from the reference, of 255.
        peaks: By megapixels, MB.
        packages: Name, version and licence of each.
        megabytes: Of what it brings, installed.
        failed: Why it was not measured.
    """

    times: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    packages: list[list[str]] = field(default_factory=list)
    megabytes: float = 0.0
    failed: str = ""


class Worker:
    """A process with one decoder."""

    def __init__(self, name: str, interpreter: Path) -> None:
        command = [str(interpreter), str(PEERS_FOLDER / "jpeg_decoders.py"), name]
        self._process = subprocess.Popen(
            [*command, *DECODERS[name].packages],
            env={**machine.environment(), "VIPS_CONCURRENCY": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.found = self._answer()

    def ask(self, *request: object) -> Any:
        """Send a request and wait for its answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"ended, status {self._process.wait()}"}


def main() -> int:
    """Make the photos, measure, print the tables; returns the exit status."""
    options = parse()
    out: Path = options.out.resolve()
    sizes = results.parse_names(options.megapixels, SIDES, "--megapixels")
    names = results.parse_names(options.decoders, DECODERS, "--decoders")
    sources = spread([path.resolve() for path in find(options.photos)], options.count)
    made = {
        size: photos.make_all(sources, photos.Kind(*SIDES[size]), out / f"{size}mp")
        for size in sizes
    }
    interpreters, measured = environment_of(names)
    machine.limit_cores(1)
    with workers(interpreters, measured) as running:
        compare(running, made, measured, out)
        for number in range(options.rounds):
            take_turns(running, made, measured, options.runs, number)
    for name in running:
        measured[name].peaks = {size: peak(name, interpreters[name], made[size]) for size in sizes}
    print(f"{machine.describe(1, 'cpu')}. {options.count} JPEGs of each size:")
    for size in sizes:
        megabytes = statistics.mean(path.stat().st_size for path in made[size]) / 1e6
        print(f"{size} MP: {SIDES[size][0]} x {SIDES[size][1]}, {megabytes:.2f} MB")
    print(f"\nhere: {environments.versions(Path(sys.executable), ('pillow', 'numpy', 'torch'))}")
    print(f"load at the end: {os.getloadavg()[0]:.1f}")
    print(f"\n```text\n{machine.command('benchmarks.serving.decoders')}\n```\n")
    print(tables(measured, sizes))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", type=Path, required=True, help="a folder with JPEGs")
    add("--count", type=int, default=3, help="photos of each size")
    add("--rounds", type=int, default=9)
    add("--runs", type=int, default=2, help="decodings of each photo in a round")
    add("--megapixels", default=",".join(SIDES), help="default: %(default)s")
    add("--decoders", default=",".join(DECODERS), help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/bench-decoders"), help="the photos that are made")
    return parser.parse_args()


def environment_of(names: Sequence[str]) -> tuple[dict[str, Path], dict[str, Measured]]:
    """The interpreter of each decoder whose packages could be installed, and their sizes."""
    interpreters: dict[str, Path] = {}
    measured = {name: Measured() for name in names}
    for name in names:
        pins = DECODERS[name].pins
        try:
            interpreters[name] = (
                environments.create_layered("decode", pins, "pip could not install it")
                if pins
                else Path(sys.executable)
            )
        except SystemExit as error:
            measured[name].failed = str(error)
            continue
        measured[name].megabytes = installed(interpreters[name], DECODERS[name])
    return interpreters, measured


def installed(interpreter: Path, decoder: Decoder) -> float:
    """MB of an environment without pip, or of the packages where they have none of their own."""
    here = [name for name in decoder.packages if not decoder.pins or name == "torch"]
    files = [file for name in here for file in metadata.files(name) or []]
    total = sum(path.stat().st_size for file in files if (path := Path(file.locate())).is_file())
    if decoder.pins:
        (packages,) = interpreter.parents[1].glob("lib/python*/site-packages")
        tools = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
        total += sum(
            path.stat().st_size
            for path in packages.rglob("*")
            if path.is_file()
            and path.suffix != ".pyc"
            and not path.relative_to(packages).parts[0].startswith(tools)
        )
    return total / 1e6


@contextmanager
def workers(
    interpreters: Mapping[str, Path], measured: Mapping[str, Measured]
) -> Iterator[dict[str, Worker]]:
    """A process for each decoder that works here; the others get their reason."""
    running: dict[str, Worker] = {}
    try:
        for name, interpreter in interpreters.items():
            worker = Worker(name, interpreter)
            measured[name].failed = worker.found.get("failed", "")
            if measured[name].failed:
                worker.close()
            else:
                measured[name].packages = worker.found["packages"]
                running[name] = worker
        yield running
    finally:
        for worker in running.values():
            worker.close()


def compare(
    running: Mapping[str, Worker],
    made: Mapping[str, Sequence[Path]],
    measured: Mapping[str, Measured],
    out: Path,
) -> None:
    """Differences of each decoder's squares from the reference's; the first decoding of each."""
    for size, paths in made.items():
        squares: dict[str, np.ndarray] = {}
        for name, worker in running.items():
            parts = []
            for path in paths:
                worker.ask("save", str(path), str(out / "square.npy"))
                parts.append(np.load(out / "square.npy").astype(np.int16))
            squares[name] = np.stack(parts)
        for name, square in squares.items():
            if REFERENCE in squares:
                difference = np.abs(square - squares[REFERENCE]).mean()
                measured[name].differences[size] = float(difference)


def take_turns(
    running: Mapping[str, Worker],
    made: Mapping[str, Sequence[Path]],
    measured: Mapping[str, Measured],
    runs: int,
    number: int,
) -> None:
    """One round: each decoder decodes each photo; the round starts with the next decoder."""
    names = list(running)
    first = number % len(names)
    for size, paths in made.items():
        for name in [*names[first:], *names[:first]]:
            times = [t for path in paths for t in running[name].ask("time", str(path), runs)]
            measured[name].times.setdefault(size, []).append(statistics.median(times))


def peak(name: str, interpreter: Path, paths: Sequence[Path]) -> float:
    """MB that a fresh process takes to decode one photo."""
    worker = Worker(name, interpreter)
    try:
        return float(worker.ask("peak", str(paths[0])))
    finally:
        worker.close()


def tables(measured: Mapping[str, Measured], sizes: Sequence[str]) -> str:
    """Times, differences and memory by size; packages."""
    works = {name: found for name, found in measured.items() if not found.failed}
    draft = works.get(DRAFT, Measured()).times
    heads = " | ".join(f"{size} MP: CPU ms | draft / it | difference | peak MB" for size in sizes)
    lines = [f"| | {heads} |", f"|---|{4 * len(sizes) * '---:|'}"]
    for name, found in works.items():
        cells = [DECODERS[name].title]
        for size in sizes:
            times = found.times[size]
            ratios = [ours / its for ours, its in zip(draft.get(size, []), times, strict=False)]
            cells += [
                f"{statistics.median(times):.1f}",
                f"{statistics.median(ratios):.2f}" if ratios else "",
                f"{found.differences[size]:.2f}" if size in found.differences else "",
                f"{found.peaks[size]:.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| packages | licence | MB installed |", "|---|---|---:|"]
    rows: dict[str, str] = {}
    for found in works.values():
        title = ", ".join(f"{package} {version}" for package, version, _ in found.packages)
        licences = ", ".join(dict.fromkeys(licence for _, _, licence in found.packages))
        rows[title] = f"| {title} | {licences} | {found.megabytes:.1f} |"
    lines += rows.values()
    lines += [
        f"\n{DECODERS[name].title}: not measured: {found.failed}"
        for name, found in measured.items()
        if found.failed
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
