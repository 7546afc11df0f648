r"""Race Fledge's service against its peers: requests per second, latency, CPU time, memory.

    python -m benchmarks.serving.race --bundle bundle --run runs/latest --photos flowers17

Each measurement starts a fresh server on the same cores and sends load from 1 caller, then from 16;
a caller sends its next request as soon as it has its answer. All competitors have the same trained
network, the same 50 JPEGs and the same preprocessing, and every answer is checked. In each round
they run one after the other, in an order that rotates. The limits (`limit`, `limit-fp32`) do the
same work in a loop in process, without a server.

`--kinds thumbnail,2mp,12mp` sends photos of 50 kB, 2 and 12 megapixels, made from the given ones,
each in a race of its own in OUT/KIND; in a round the kinds follow one another. `--before CHECKOUT`
adds an older Fledge as a peer.

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import before, environments, machine, photos, results
from benchmarks.serving import measurement, peer_environment, tables
from benchmarks.serving.measurement import Context, Row
from benchmarks.serving.peers import IN_PEER_ENVIRONMENT, PEERS, Peer
from benchmarks.serving.photos import choose
from benchmarks.serving.processes import Failed


def main() -> int:
    """Run the measurements that have no rows yet, then print; returns the exit status."""
    options = parse()
    out: Path = options.out.resolve()
    kinds = results.parse_names(options.kinds, photos.NAMES, "--kinds")
    folders = [photos.folder_of(kind, out) for kind in kinds]
    if options.markdown:
        return show_all(folders, options)
    if not (options.bundle and options.photos):
        raise SystemExit("name the bundle and the photos: --bundle DIR --photos DIR")
    machine.require_crop(options.bundle)
    peers = chosen_peers(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped
    machine.limit_cores(options.threads)
    about = machine.describe(options.threads, "cpu")
    print(about, file=sys.stderr)
    contexts = []
    for kind, folder in zip(kinds, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        context = prepare(options, peers, kind, folder)
        command = machine.command("benchmarks.serving.race")
        header = [about, command, *versions(context, peers)]
        require_same_settings(context, kind, header, folder / "settings.json")
        (folder / "machine.txt").write_text("\n".join(header) + "\n")
        contexts.append(context)
    for number, context, peer, setting in results.jobs(peers, options.rounds, contexts):
        done = {
            row.callers
            for row in results.read(context.out / results.FILE, Row)
            if (row.peer, row.setting, row.round) == (peer.name, setting.name, number)
        }
        if done >= set(context.callers):
            continue
        try:
            new = measurement.measure(peer, setting, number, context)
        except Failed as error:
            print(f"{error}\nthe same command resumes here", file=sys.stderr)
            return 1
        results.append(context.out / results.FILE, new)
        for row in new:
            kind = "" if context.out == out else f"{context.out.name}: "
            print(f"{kind}{describe(row)}", file=sys.stderr, flush=True)
    return show_all(folders, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="the bundle to serve, written by `fledge export`")
    add("--run", type=Path, help="the run it was exported from; needed by peer `torch`")
    add("--photos", type=Path, help="a folder with JPEGs of 30 to 110 kB; 50 are sent")
    add("--kinds", default=photos.GIVEN, help=photos.HELP)
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=5.0, help="measured, for each number of callers")
    add("--warm", type=float, default=2.0, help="seconds of load before them, not measured")
    add("--callers", default="1,16", help="numbers of concurrent callers: 1,16")
    add("--threads", type=int, default=2, help="cores shared by server and callers")
    add("--peers", help=f"default: {before.default_peers(PEERS, None)}")
    before.add_options(parser)
    add("--peers-python", type=Path, help="an interpreter with them; default: create one")
    add("--out", type=Path, default=Path("runs/bench-serve"), help="rows and logs")
    add("--markdown", action="store_true", help="print the tables of OUT; measure nothing")
    add("--picture", type=Path, help="default: OUT/serve.png")
    add("--title", default="", help="of the picture")
    return parser.parse_args()


def chosen_peers(options: argparse.Namespace) -> list[Peer]:
    """The peers of --peers, in that order."""
    default = before.default_peers(PEERS, options.before)
    names = results.parse_names(options.peers or default, PEERS, "--peers")
    if "torch" in names and not options.run:
        raise SystemExit("--peers torch serves a run: add --run DIR, or leave torch out")
    before.require(names, options.before)
    return [PEERS[name] for name in names]


def prepare(options: argparse.Namespace, peers: list[Peer], kind: str, out: Path) -> Context:
    """Choose and label the photos; create the peers' environment if one of them takes part."""
    needed = any(peer.name in IN_PEER_ENVIRONMENT for peer in peers)
    sent = photos.prepare(choose(options.photos.resolve()), kind, out)
    (out / "photos.json").write_text(json.dumps([str(path) for path in sent]))
    context = Context(
        bundle=options.bundle.resolve(),
        run=options.run.resolve() if options.run else None,
        before=before.of(options),
        photos=tuple(sent),
        turned=frozenset(n for n, path in enumerate(sent) if photos.is_turned(path)),
        labels={},
        callers=tuple(sorted(map(int, options.callers.split(",")))),
        threads=options.threads,
        seconds=options.seconds,
        warm=options.warm,
        peers_python=options.peers_python or (peer_environment.python() if needed else Path()),
        out=out,
    )
    precisions = dict.fromkeys(context.precision(peer) for peer in peers)
    labels = {name: measurement.labels_of(context, name) for name in precisions}
    return replace(context, labels=labels)


def versions(context: Context, peers: list[Peer]) -> list[str]:
    """Lines with the versions here and, if used, in the peers' environment."""
    reported = peer_environment.REPORTED
    lines = [f"here: {environments.versions(Path(sys.executable), reported)}"]
    if any(peer.name in IN_PEER_ENVIRONMENT for peer in peers):
        there = environments.versions(context.peers_python, reported)
        lines.append(f"FastAPI and LitServe: {there}")
    return [*lines, context.before.describe()] if context.before else lines


def require_same_settings(context: Context, kind: str, header: list[str], path: Path) -> None:
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
        **photos.settings(kind),
    }
    machine.require_same_settings(values, path, "rows")


def describe(row: Row) -> str:
    """One row as a line of progress."""
    text = f"{row.peer}, {row.setting}, round {row.round}, {row.callers}: "
    text += f"{results.format_rate(row.rps)} rps, p50 {row.p50:.1f} ms, p99 {row.p99:.1f} ms"
    text += f", CPU {row.cpu:.2f} ms"
    return text + f", errors {row.errors}, other labels {row.others}"


def show_all(folders: Sequence[Path], options: argparse.Namespace) -> int:
    """Print the results of each kind of photos; 1 if a peer's answers are too often other ones."""
    wrong = []
    for folder in folders:
        path: Path = options.picture or folder / "serve.png"
        several = options.picture and len(folders) > 1
        wrong += show(
            folder, path.with_stem(f"{path.stem}-{folder.name}") if several else path, options.title
        )
    print("".join(f"{line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


def show(out: Path, path: Path, title: str) -> list[str]:
    """Print the tables and draw the picture at `path`; returns the peers' disagreements."""
    rows = results.read(out / results.FILE, Row)
    if not rows:
        raise SystemExit(f"{out} holds no rows yet")
    about, command, *versions_found = (out / "machine.txt").read_text().splitlines()
    settings = json.loads((out / "settings.json").read_text())
    precision = settings["precision"]
    print(f"{about}. {settings['arch']}, {photos.describe(settings)}.\n")
    print("\n".join(f"- {item}" for item in versions_found))
    print(f"\n```text\n{command}\n```\n\n{tables.markdown(rows, precision)}")
    title = title or f"{settings['arch']}, {settings['threads']} cores"
    tables.picture(rows, path, title, precision)
    print(f"picture: {path}", file=sys.stderr)
    return results.disagreements(tables.Results(rows).peers, rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
