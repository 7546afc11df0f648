r"""Race Fledge's service against its peers: requests per second, latency, CPU time, memory.

    python -m benchmarks.serving.race --bundle bundle --run runs/latest --photos flowers17

Each measurement starts a fresh server on the same cores and sends load from 1 caller, then from 16;
a caller sends its next request as soon as it has its answer. All competitors have the same trained
network, the same 50 JPEGs and the same preprocessing, and every answer is checked. In each round
they run one after the other, in an order that rotates. The limits (`limit`, `limit-fp32`) do the
same work in a loop in process, without a server.

FastAPI and LitServe run in their own virtual environment, which is created at first use. Rows are
appended to OUT/results.jsonl: the same command resumes an interrupted race, or adds rounds and
peers. `--markdown` measures nothing and prints the tables of OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import environments, machine, results
from benchmarks.serving import measurement, peer_environment, tables
from benchmarks.serving.measurement import Context, Row
from benchmarks.serving.peers import IN_PEER_ENVIRONMENT, PEERS, Peer
from benchmarks.serving.photos import choose
from benchmarks.serving.processes import Failed


def main() -> int:
    """Run the measurements that have no rows yet, then print; returns the exit status."""
    options = parse()
    out: Path = options.out.resolve()
    if options.markdown:
        return show(results.read(out / results.FILE, Row), out, options)
    if not (options.bundle and options.photos):
        raise SystemExit("name the bundle and the photos: --bundle DIR --photos DIR")
    peers = chosen_peers(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped
    machine.limit_cores(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    context = prepare(options, peers, out)
    about = machine.describe(options.threads, "cpu")
    command = machine.command("benchmarks.serving.race")
    header = [about, command, *versions(context, peers)]
    require_same_settings(context, header, out / "settings.json")
    (out / "machine.txt").write_text("\n".join(header) + "\n")
    print(about, file=sys.stderr)
    rows = results.read(out / results.FILE, Row)
    for number, peer, setting in results.jobs(peers, options.rounds):
        done = {
            row.callers
            for row in rows
            if (row.peer, row.setting, row.round) == (peer.name, setting.name, number)
        }
        if done >= set(context.callers):
            continue
        try:
            new = measurement.measure(peer, setting, number, context)
        except Failed as error:
            print(f"{error}\nthe same command resumes here", file=sys.stderr)
            return 1
        rows += new
        results.append(out / results.FILE, new)
        for row in new:
            print(describe(row), file=sys.stderr, flush=True)
    return show(rows, out, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="the bundle to serve, written by `fledge export`")
    add("--run", type=Path, help="the run it was exported from; needed by peer `torch`")
    add("--photos", type=Path, help="a folder with JPEGs of 30 to 110 kB; 50 are sent")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=5.0, help="measured, for each number of callers")
    add("--warm", type=float, default=2.0, help="seconds of load before them, not measured")
    add("--callers", default="1,16", help="numbers of concurrent callers: 1,16")
    add("--threads", type=int, default=2, help="cores shared by server and callers")
    add("--peers", default=",".join(PEERS), help="default: %(default)s")
    add("--peers-python", type=Path, help="an interpreter with them; default: create one")
    add("--out", type=Path, default=Path("runs/bench-serve"), help="rows and logs")
    add("--markdown", action="store_true", help="print the tables of OUT; measure nothing")
    add("--picture", type=Path, help="default: OUT/serve.png")
    add("--title", default="", help="of the picture")
    return parser.parse_args()


def chosen_peers(options: argparse.Namespace) -> list[Peer]:
    """The peers of --peers, in that order."""
    names = results.parse_peers(options.peers, PEERS)
    if "torch" in names and not options.run:
        raise SystemExit("--peers torch serves a run: add --run DIR, or leave torch out")
    return [PEERS[name] for name in names]


def prepare(options: argparse.Namespace, peers: list[Peer], out: Path) -> Context:
    """Choose and label the photos; create the peers' environment if one of them takes part."""
    needed = any(peer.name in IN_PEER_ENVIRONMENT for peer in peers)
    photos = choose(options.photos.resolve())
    (out / "photos.json").write_text(json.dumps([str(path) for path in photos]))
    context = Context(
        bundle=options.bundle.resolve(),
        run=options.run.resolve() if options.run else None,
        photos=tuple(photos),
        labels={},
        callers=tuple(sorted(map(int, options.callers.split(",")))),
        threads=options.threads,
        seconds=options.seconds,
        warm=options.warm,
        peers_python=options.peers_python or (peer_environment.python() if needed else Path()),
        out=out,
    )
    labels: dict[str, list[str]] = {}
    for peer in peers:
        if peer.precision not in labels:
            precision = measurement.precision_of(peer, context.bundle)
            labels[peer.precision] = measurement.labels_of(context, precision)
    return replace(context, labels=labels)


def versions(context: Context, peers: list[Peer]) -> list[str]:
    """Lines with the versions here and, if used, in the peers' environment."""
    reported = peer_environment.REPORTED
    lines = [f"here: {environments.versions(Path(sys.executable), reported)}"]
    if any(peer.name in IN_PEER_ENVIRONMENT for peer in peers):
        there = environments.versions(context.peers_python, reported)
        lines.append(f"FastAPI and LitServe: {there}")
    return lines


def require_same_settings(context: Context, header: list[str], path: Path) -> None:
    """Refuse to mix rows of different settings or machines in one folder."""
    manifest = json.loads((context.bundle / "manifest.json").read_text())
    content = b"".join(photo.read_bytes() for photo in context.photos)
    values = {
        "machine": header[0],
        "versions": header[2],
        "bundle": f"{manifest['name']}:{manifest['version']}",
        "arch": f"{manifest['arch']} at {manifest['preprocess']['size']} px",
        "photos": f"{len(context.photos)}, {hashlib.sha256(content).hexdigest()[:12]}",
        "bytes": str(len(content)),
        "callers": ",".join(map(str, context.callers)),
        "threads": str(context.threads),
        "seconds": f"{context.seconds:g} after {context.warm:g}",
        "precision": "int8" if "int8" in manifest["precisions"] else "fp32",
    }
    machine.require_same_settings(values, path, "rows")


def describe(row: Row) -> str:
    """One row as a line of progress."""
    text = f"{row.peer}, {row.setting}, round {row.round}, {row.callers}: {row.rps:.0f} rps"
    text += f", p50 {row.p50:.1f} ms, p99 {row.p99:.1f} ms, CPU {row.cpu:.2f} ms"
    return text + f", errors {row.errors}, other labels {row.others}"


def show(rows: list[Row], out: Path, options: argparse.Namespace) -> int:
    """Print the tables and draw the picture."""
    if not rows:
        raise SystemExit(f"{out} holds no rows yet")
    about, command, *versions_found = (out / "machine.txt").read_text().splitlines()
    settings = json.loads((out / "settings.json").read_text())
    precision = settings["precision"]
    print(f"{about}. {settings['arch']}, {settings['photos'].split(',')[0]} JPEGs.\n")
    print("\n".join(f"- {item}" for item in versions_found))
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
