r"""Race Fledge's service against its peers: requests a second, latency, processor time, memory.

    python benchmarks/serving/race.py --bundle bundle --run runs/latest --photos flowers17

Each measurement is a fresh server on the same cores, asked by 1 caller and then by 16, who ask
again as soon as they have their answer. All have the same trained network, the same 50 JPEGs and
the same preprocessing, and every answer is checked. In each round they run one after the other, in
an order that rotates. The limits are no servers: the same work in a bare loop, without HTTP.

FastAPI and LitServe get an environment of their own, made at first use. Rows are appended to
OUT/results.jsonl: the same command goes on with an interrupted race, or adds rounds and peers.

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
from benchmarks.serving import environments, processes, tables
from benchmarks.serving import peers as serve_peers
from benchmarks.serving import photos as serve_photos
from benchmarks.serving import run as serve_run
from benchmarks.serving.peers import Peer
from benchmarks.serving.run import Place, Row

RESULTS = "results.jsonl"


def main() -> int:
    """Measure what is missing, then print; returns the exit status."""
    options = parse()
    out: Path = options.out.resolve()
    if options.markdown:
        return show(kept.read(out / RESULTS, Row), out, options)
    if not (options.bundle and options.photos):
        raise SystemExit("name the bundle and the photos: --bundle DIR --photos DIR")
    peers = chosen(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    machine.keep_to(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    place = prepare(options, peers, out)
    about = machine.describe(options.threads, "cpu")
    told = [about, shlex.join(["python", *sys.argv]), *versions(place, peers)]
    same_settings(place, told, out / "settings.json")
    (out / "machine.txt").write_text("\n".join(told) + "\n")
    print(about, file=sys.stderr)
    rows = kept.read(out / RESULTS, Row)
    for turn, peer, setting in kept.jobs(peers, options.rounds):
        done = {
            row.callers
            for row in rows
            if (row.peer, row.setting, row.round) == (peer.name, setting.name, turn)
        }
        if done >= set(place.callers):
            continue
        try:
            made = serve_run.measure(peer, setting, turn, place)
        except processes.Failed as error:
            print(f"{error}\nthe same command goes on from here", file=sys.stderr)
            return 1
        rows += made
        kept.append(out / RESULTS, made)
        for row in made:
            print(line(row), file=sys.stderr, flush=True)
    return show(rows, out, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="the bundle to serve, as `fledge export` wrote it")
    add("--run", type=Path, help="the run it was exported from; eager PyTorch serves that")
    add("--photos", type=Path, help="a folder with JPEGs of 30 to 110 kB; 50 of them are sent")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=5.0, help="that count, for each number of callers")
    add("--warm", type=float, default=2.0, help="seconds before them that do not")
    add("--callers", default="1,16", help="how many ask at a time, each in its turn")
    add("--threads", type=int, default=2, help="cores that server and callers share")
    add("--peers", default=",".join(serve_peers.ALL), help="default: %(default)s")
    add("--peers-python", type=Path, help="an interpreter that has them; else one is made")
    add("--out", type=Path, default=Path("runs/bench-serve"), help="rows and logs; go on here")
    add("--markdown", action="store_true", help="print the tables of OUT; measure nothing")
    add("--picture", type=Path, help="default: OUT/serve.png")
    add("--title", default="", help="of the picture")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Peer]:
    """The peers that are asked for, in that order."""
    names = kept.asked(options.peers, serve_peers.ALL)
    if "torch" in names and not options.run:
        raise SystemExit("--peers torch serves a run: name it by --run, or leave torch out")
    return [serve_peers.ALL[name] for name in names]


def prepare(options: argparse.Namespace, peers: list[Peer], out: Path) -> Place:
    """Photos chosen and labelled, and the peers' environment made, where one takes part."""
    elsewhere = any(peer.name in serve_peers.ELSEWHERE for peer in peers)
    photos = serve_photos.choose(options.photos.resolve())
    (out / "photos.json").write_text(json.dumps([str(path) for path in photos]))
    place = Place(
        bundle=options.bundle.resolve(),
        run=options.run.resolve() if options.run else None,
        photos=tuple(photos),
        labels={},
        callers=tuple(sorted(map(int, options.callers.split(",")))),
        threads=options.threads,
        seconds=options.seconds,
        warm=options.warm,
        peers_python=options.peers_python or (environments.python() if elsewhere else Path()),
        out=out,
    )
    known: dict[str, list[str]] = {}
    for peer in peers:
        if peer.precision not in known:
            precision = serve_run.precision_of(peer, place.bundle)
            known[peer.precision] = serve_run.labels_of(place, precision)
    return replace(place, labels=known)


def versions(place: Place, peers: list[Peer]) -> list[str]:
    """What runs here, and in the peers' environment."""
    found = [f"here: {environments.versions(Path(sys.executable))}"]
    if any(peer.name in serve_peers.ELSEWHERE for peer in peers):
        found.append(f"FastAPI and LitServe: {environments.versions(place.peers_python)}")
    return found


def same_settings(place: Place, told: list[str], path: Path) -> None:
    """Refuse to mix rows of different settings, or of different machines."""
    manifest = json.loads((place.bundle / "manifest.json").read_text())
    content = b"".join(photo.read_bytes() for photo in place.photos)
    values = {
        "machine": told[0],
        "versions": told[2],
        "bundle": f"{manifest['name']}:{manifest['version']}",
        "arch": f"{manifest['arch']} at {manifest['preprocess']['size']} px",
        "photos": f"{len(place.photos)}, {hashlib.sha256(content).hexdigest()[:12]}",
        "bytes": str(len(content)),
        "callers": ",".join(map(str, place.callers)),
        "threads": str(place.threads),
        "seconds": f"{place.seconds:g} after {place.warm:g}",
        "precision": "int8" if "int8" in manifest["precisions"] else "fp32",
    }
    machine.same(values, path, "rows")


def line(row: Row) -> str:
    """One row for whoever waits."""
    told = f"{row.peer}, {row.setting}, round {row.round}, {row.callers}: {row.rps:.0f} rps"
    told += f", p50 {row.p50:.1f} ms, p99 {row.p99:.1f} ms, CPU {row.cpu:.2f} ms"
    return told + f", errors {row.errors}, other labels {row.others}"


def show(rows: list[Row], out: Path, options: argparse.Namespace) -> int:
    """Print the tables, and draw."""
    if not rows:
        raise SystemExit(f"{out} holds no rows yet")
    about, command, *found = (out / "machine.txt").read_text().splitlines()
    settings = json.loads((out / "settings.json").read_text())
    precision = settings["precision"]
    print(f"{about}. {settings['arch']}, {settings['photos'].split(',')[0]} JPEGs.\n")
    print("\n".join(f"- {item}" for item in found))
    print(f"\n```text\n{command}\n```\n\n{tables.markdown(rows, precision)}")
    path = options.picture or out / "serve.png"
    title = options.title or f"{settings['arch']}, {settings['threads']} cores"
    tables.picture(rows, path, title, precision)
    print(f"picture: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
