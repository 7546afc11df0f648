r"""Race `fledge score` against its peers, and against the same work in an in-process loop.

    python -m benchmarks.scoring.race --bundle bundle --run runs/latest --photos flowers17

Each measurement runs two fresh processes that score a folder of links to the photos: a short job
and a long one, timed from start to end. The rate is the long job's additional photos per additional
second; the remaining seconds are the start. All competitors have the same trained network, photos
and cores, and every answer is checked. In each round they run one after the other, in an order that
rotates. The limits (`limit`, `limit-fp32`) decode and infer in a loop in process, with processes or
with threads.

timm and transformers run in their own virtual environment, which is created at first use. Rows are
appended to OUT/results.jsonl: the same command resumes an interrupted race, or adds rounds and
peers. `--memory N` scores N photos once by Fledge instead, and reports the memory over time.
`--markdown` measures nothing and prints the tables of OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import machine, results
from benchmarks.scoring import measurement, memory, peer_environment, tables
from benchmarks.scoring.measurement import Context, Row
from benchmarks.scoring.peers import IN_PEER_ENVIRONMENT, NEED_RUN, PEERS, Peer
from benchmarks.scoring.photos import find
from benchmarks.scoring.processes import Failed


def main() -> int:
    """Run the measurements that have no row yet, then print; returns the exit status."""
    options = parse()
    out: Path = options.out.resolve()
    if options.markdown:
        return show(results.read(out / results.FILE, Row), out)
    if not (options.bundle and options.photos):
        raise SystemExit("name the bundle and the photos: --bundle DIR --photos DIR")
    peers = chosen_peers(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the competitor is killed
    machine.limit_cores(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    about = machine.describe(options.threads, "cpu")
    print(about, file=sys.stderr)
    try:
        context = prepare(options, [] if options.memory else peers, out)
        if options.memory:
            print(f"{about}.\n\n{memory.measure(context, options.memory)}")
            return 0
        command = machine.command("benchmarks.scoring.race")
        header = [about, command, *peer_environment.versions(context.peers_python)]
        require_same_settings(context, header, out / "settings.json")
        (out / "machine.txt").write_text("\n".join(header) + "\n")
        labels = {context.precision(peer): measurement.labels(context, peer) for peer in peers}
        race(peers, options.rounds, replace(context, labels=labels))
    except Failed as error:
        print(f"{error}\nthe same command resumes here", file=sys.stderr)
        return 1
    return show(results.read(out / results.FILE, Row), out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="the bundle to score with, written by `fledge export`")
    add("--run", type=Path, help="the run it was exported from; for torch, timm, transformers")
    add("--photos", type=Path, help="a folder with JPEGs, also in subfolders")
    add("--images", type=int, default=1360, help="of a long job; photos repeat if there are fewer")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2, help="cores of each competitor")
    add("--peers", default=",".join(PEERS), help="default: %(default)s")
    add("--peers-python", type=Path, help="an interpreter with them; default: create one")
    add("--memory", type=int, default=0, metavar="N", help="only measure the memory of N photos")
    add("--out", type=Path, default=Path("runs/bench-score"), help="rows and logs")
    add("--markdown", action="store_true", help="print the tables of OUT; measure nothing")
    return parser.parse_args()


def chosen_peers(options: argparse.Namespace) -> list[Peer]:
    """The peers of --peers, in that order."""
    names = results.parse_peers(options.peers, PEERS)
    need_run = sorted(set(names) & set(NEED_RUN))
    if need_run and not (options.run or options.memory):
        raise SystemExit(
            f"--peers {','.join(need_run)} need a run: add --run DIR, or leave them out"
        )
    return [PEERS[name] for name in names]


def prepare(options: argparse.Namespace, peers: list[Peer], out: Path) -> Context:
    """The shared settings; creates the peers' environment and converts the network if needed."""
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    context = Context(
        bundle=options.bundle.resolve(),
        run=options.run.resolve() if options.run else None,
        network=None,
        photos=tuple(path.resolve() for path in find(options.photos)),
        labels={},
        images=options.images,
        threads=options.threads,
        peers_python=None,
        batch=manifest["tuning"].get("cpu", {}).get("max_batch", 1),
        fastest="int8" if "int8" in manifest["precisions"] else "fp32",
        out=out,
    )
    if context.run and any(peer.name in IN_PEER_ENVIRONMENT for peer in peers):
        python = options.peers_python or peer_environment.python()
        folder, env = out / "network", machine.environment()
        network = peer_environment.convert_network(python, context.run, folder, env)
        context = replace(context, peers_python=python, network=network)
    return context


def race(peers: list[Peer], rounds: int, context: Context) -> None:
    """Run the measurements that have no row yet."""
    rows = results.read(context.out / results.FILE, Row)
    done = {(row.peer, row.setting, row.round) for row in rows}
    for number, peer, setting in results.jobs(peers, rounds):
        if (peer.name, setting.name, number) not in done:
            row = measurement.measure(peer, setting, number, context)
            results.append(context.out / results.FILE, [row])
            line = f"{row.peer}, {row.setting}, round {row.round}: {row.rate:.0f} images/s, "
            line += f"start {row.start:.1f} s, CPU {row.cpu_ms:.2f} ms, {row.peak:.0f} MB"
            print(f"{line}, other labels {row.others}", file=sys.stderr, flush=True)


def require_same_settings(context: Context, header: list[str], path: Path) -> None:
    """Refuse to mix rows of different settings or machines in one folder."""
    manifest = json.loads((context.bundle / "manifest.json").read_text())
    content = hashlib.sha256(b"".join(photo.read_bytes() for photo in context.photos))
    values = {
        "machine": header[0],
        "versions": header[2],
        "bundle": f"{manifest['name']}:{manifest['version']}",
        "arch": f"{manifest['arch']} at {manifest['preprocess']['size']} px",
        "photos": f"{len(context.photos)}, {content.hexdigest()[:12]}",
        "images": str(context.images),
        "threads": str(context.threads),
        "precision": context.fastest,
    }
    machine.require_same_settings(values, path, "rows")


def show(rows: list[Row], out: Path) -> int:
    """Print the tables."""
    if not rows:
        raise SystemExit(f"{out} holds no rows yet")
    about, command, *versions = (out / "machine.txt").read_text().splitlines()
    settings = json.loads((out / "settings.json").read_text())
    photos = settings["photos"].split(",")[0]
    print(f"{about}. {settings['arch']}, {photos} JPEGs.\n")
    print("\n".join(f"- {item}" for item in versions))
    print(f"\n```text\n{command}\n```\n\n{tables.markdown(rows, settings['precision'])}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
