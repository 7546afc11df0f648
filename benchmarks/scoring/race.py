r"""Race `fledge score` against its peers, and against the same work in a bare loop.

    python benchmarks/scoring/race.py --bundle bundle --run runs/latest --photos flowers17

Every measurement is a fresh process that scores a folder of links to the photos, from its start to
its end; a short job and a long one. What the long one takes more, for the photos that it has more,
is the rate; the rest is the start. All have the same trained network, the same photos and the same
cores, and every answer is checked. In each round they run one after the other, in an order that
rotates. The limit is no tool: decode and session in a bare loop, by processes or by threads.

timm and transformers get an environment of their own, made at first use. Rows are appended to
OUT/results.jsonl: the same command goes on with an interrupted race, or adds rounds and peers.

`--memory N` scores N photos once by Fledge instead, and tells what memory that took on the way.
`--markdown` measures nothing and prints the tables again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import machine
from benchmarks import rows as kept
from benchmarks.scoring import environments, processes, tables
from benchmarks.scoring import memory as score_memory
from benchmarks.scoring import peers as score_peers
from benchmarks.scoring import photos as score_photos
from benchmarks.scoring import run as score_run
from benchmarks.scoring.peers import Peer
from benchmarks.scoring.run import Place, Row

RESULTS = "results.jsonl"


def main() -> int:
    """Measure what is missing, then print; returns the exit status."""
    options = parse()
    out: Path = options.out.resolve()
    if options.markdown:
        return show(kept.read(out / RESULTS, Row), out)
    if not (options.bundle and options.photos):
        raise SystemExit("name the bundle and the photos: --bundle DIR --photos DIR")
    peers = chosen(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the competitor ends with us
    machine.keep_to(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    about = machine.describe(options.threads, "cpu")
    print(about, file=sys.stderr)
    try:
        place = prepare(options, [] if options.memory else peers, out)
        if options.memory:
            print(f"{about}.\n\n{score_memory.measure(place, options.memory)}")
            return 0
        command = shlex.join(["python", *sys.argv])
        told = [about, command, *environments.versions(place.peers_python)]
        same_settings(place, told, out / "settings.json")
        (out / "machine.txt").write_text("\n".join(told) + "\n")
        known = {place.precision(peer): score_run.labels(place, peer) for peer in peers}
        race(peers, options.rounds, replace(place, labels=known))
    except processes.Failed as error:
        print(f"{error}\nthe same command goes on from here", file=sys.stderr)
        return 1
    return show(kept.read(out / RESULTS, Row), out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="the bundle to score by, as `fledge export` wrote it")
    add("--run", type=Path, help="the run it was exported from; PyTorch's competitors have that")
    add("--photos", type=Path, help="a folder with JPEGs, of any depth")
    add("--images", type=int, default=1360, help="of a long job; photos repeat (%(default)s)")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2, help="cores that each may use")
    add("--peers", default=",".join(score_peers.ALL), help="default: %(default)s")
    add("--peers-python", type=Path, help="an interpreter that has them; else one is made")
    add("--memory", type=int, default=0, metavar="N", help="score N photos and weigh; no race")
    add("--out", type=Path, default=Path("runs/bench-score"), help="rows and logs; go on here")
    add("--markdown", action="store_true", help="print the tables of OUT; measure nothing")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Peer]:
    """The peers that are asked for, in that order."""
    names = kept.asked(options.peers, score_peers.ALL)
    eager = sorted(set(names) & set(score_peers.EAGER))
    if eager and not (options.run or options.memory):
        raise SystemExit(
            f"--peers {','.join(eager)} need a run: name it by --run, or leave them out"
        )
    return [score_peers.ALL[name] for name in names]


def prepare(options: argparse.Namespace, peers: list[Peer], out: Path) -> Place:
    """The peers' environment, and the network in their shapes."""
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    place = Place(
        bundle=options.bundle.resolve(),
        run=options.run.resolve() if options.run else None,
        network=None,
        photos=tuple(path.resolve() for path in score_photos.find(options.photos)),
        labels={},
        images=options.images,
        threads=options.threads,
        peers_python=None,
        batch=manifest["tuning"].get("cpu", {}).get("max_batch", 1),
        fastest="int8" if "int8" in manifest["precisions"] else "fp32",
        out=out,
    )
    if place.run and any(peer.name in score_peers.ELSEWHERE for peer in peers):
        python = options.peers_python or environments.python()
        network = environments.network(python, place.run, out / "network", machine.environment())
        place = replace(place, peers_python=python, network=network)
    return place


def race(peers: list[Peer], rounds: int, place: Place) -> None:
    """Measure what is missing."""
    rows = kept.read(place.out / RESULTS, Row)
    done = {(row.peer, row.setting, row.round) for row in rows}
    for turn, peer, setting in kept.jobs(peers, rounds):
        if (peer.name, setting.name, turn) not in done:
            row = score_run.measure(peer, setting, turn, place)
            kept.append(place.out / RESULTS, [row])
            told = f"{row.peer}, {row.setting}, round {row.round}: {row.rate:.0f} images/s, "
            told += f"start {row.start:.1f} s, CPU {row.cpu_ms:.2f} ms, {row.peak:.0f} MB"
            print(f"{told}, other labels {row.others}", file=sys.stderr, flush=True)


def same_settings(place: Place, told: list[str], path: Path) -> None:
    """Refuse to mix rows of different settings, or of different machines."""
    manifest = json.loads((place.bundle / "manifest.json").read_text())
    content = hashlib.sha256(b"".join(photo.read_bytes() for photo in place.photos))
    values = {
        "machine": told[0],
        "versions": told[2],
        "bundle": f"{manifest['name']}:{manifest['version']}",
        "arch": f"{manifest['arch']} at {manifest['preprocess']['size']} px",
        "photos": f"{len(place.photos)}, {content.hexdigest()[:12]}",
        "images": str(place.images),
        "threads": str(place.threads),
        "precision": place.fastest,
    }
    machine.same(values, path, "rows")


def show(rows: list[Row], out: Path) -> int:
    """Print the tables."""
    if not rows:
        raise SystemExit(f"{out} holds no rows yet")
    about, command, *found = (out / "machine.txt").read_text().splitlines()
    settings = json.loads((out / "settings.json").read_text())
    photos = settings["photos"].split(",")[0]
    print(f"{about}. {settings['arch']}, {photos} JPEGs.\n")
    print("\n".join(f"- {item}" for item in found))
    print(f"\n```text\n{command}\n```\n\n{tables.markdown(rows, settings['precision'])}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
