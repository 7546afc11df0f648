r"""Race `fledge score` against its peers, and against the same work in an in-process loop.

    python -m benchmarks.scoring.race --bundle bundle --run runs/latest --photos flowers17

Each measurement runs two fresh processes that score a folder of links to the photos: a short job
and a long one, timed from start to end. The rate is the long job's additional photos per additional
second; the remaining seconds are the start. All competitors have the same trained network, photos
and cores, and every answer is checked. In each round they run one after the other, in an order that
rotates. The limits (`limit`, `limit-fp32`) decode and infer in a loop in process, with processes or
with threads.

`--kinds thumbnail,2mp,12mp` scores photos of 50 kB, 2 and 12 megapixels, made from the given ones,
each in a race of its own in OUT/KIND; in a round the kinds follow one another. `--before CHECKOUT`
adds an older Fledge as a peer.

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
from typing import Final

from benchmarks import before, machine, photos, results
from benchmarks.scoring import measurement, memory, peer_environment, tables
from benchmarks.scoring.measurement import Context, Row
from benchmarks.scoring.peers import IN_PEER_ENVIRONMENT, NEED_RUN, PEERS, Peer
from benchmarks.scoring.photos import find, spread
from benchmarks.scoring.processes import Failed

IMAGES: Final = {photos.GIVEN: 1360, "thumbnail": 1360, "2mp": 680, "12mp": 240}
"""Photos of a long job by kind."""
MADE: Final = 50
"""Photos that are made of a kind."""


def main() -> int:
    """Run the measurements that have no row yet, then print; returns the exit status."""
    options = parse()
    out: Path = options.out.resolve()
    kinds = results.parse_names(options.kinds, photos.NAMES, "--kinds")
    folders = [photos.folder_of(kind, out) for kind in kinds]
    if options.markdown:
        return show_all(folders)
    if not (options.bundle and options.photos):
        raise SystemExit("name the bundle and the photos: --bundle DIR --photos DIR")
    machine.require_crop(options.bundle)
    peers = chosen_peers(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the competitor is killed
    machine.limit_cores(options.threads)
    about = machine.describe(options.threads, "cpu")
    print(about, file=sys.stderr)
    try:
        contexts = []
        for kind, folder in zip(kinds, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            context = prepare(options, [] if options.memory else peers, kind, folder)
            if options.memory:
                print(f"{about}.\n\n{memory.measure(context, options.memory)}")
                continue
            command = machine.command("benchmarks.scoring.race")
            header = [about, command, *versions(context)]
            require_same_settings(context, kind, header, folder / "settings.json")
            (folder / "machine.txt").write_text("\n".join(header) + "\n")
            labels = {context.precision(peer): measurement.labels(context, peer) for peer in peers}
            contexts.append(replace(context, labels=labels))
        race(peers, options.rounds, contexts)
    except Failed as error:
        print(f"{error}\nthe same command resumes here", file=sys.stderr)
        return 1
    return 0 if options.memory else show_all(folders)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="the bundle to score with, written by `fledge export`")
    add("--run", type=Path, help="the run it was exported from; for torch, timm, transformers")
    add("--photos", type=Path, help="a folder with JPEGs, also in subfolders")
    add("--kinds", default=photos.GIVEN, help=photos.HELP)
    images = ", ".join(f"{kind} {count}" for kind, count in IMAGES.items())
    add("--images", type=int, help=f"of a long job, repeating photos if need be; default: {images}")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2, help="cores of each competitor")
    add("--peers", help=f"default: {before.default_peers(PEERS, None)}")
    before.add_options(parser)
    add("--peers-python", type=Path, help="an interpreter with them; default: create one")
    add("--memory", type=int, default=0, metavar="N", help="only measure the memory of N photos")
    add("--out", type=Path, default=Path("runs/bench-score"), help="rows and logs")
    add("--markdown", action="store_true", help="print the tables of OUT; measure nothing")
    return parser.parse_args()


def chosen_peers(options: argparse.Namespace) -> list[Peer]:
    """The peers of --peers, in that order."""
    default = before.default_peers(PEERS, options.before)
    names = results.parse_names(options.peers or default, PEERS, "--peers")
    before.require(names, options.before)
    need_run = sorted(set(names) & set(NEED_RUN))
    if need_run and not (options.run or options.memory):
        raise SystemExit(
            f"--peers {','.join(need_run)} need a run: add --run DIR, or leave them out"
        )
    return [PEERS[name] for name in names]


def prepare(options: argparse.Namespace, peers: list[Peer], kind: str, out: Path) -> Context:
    """The shared settings; creates the peers' environment and converts the network if needed."""
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    given = [path.resolve() for path in find(options.photos)]
    if kind != photos.GIVEN:
        given = spread(given, min(MADE, len(given)))
    scored = photos.prepare(given, kind, out)
    context = Context(
        bundle=options.bundle.resolve(),
        run=options.run.resolve() if options.run else None,
        network=None,
        before=before.of(options),
        photos=tuple(scored),
        turned=frozenset(str(path) for path in scored if photos.is_turned(path)),
        labels={},
        images=options.images or IMAGES[kind],
        threads=options.threads,
        peers_python=None,
        batch=manifest["tuning"].get("cpu", {}).get("max_batch", 1),
        out=out,
    )
    if context.run and any(peer.name in IN_PEER_ENVIRONMENT for peer in peers):
        python = options.peers_python or peer_environment.python()
        folder, env = options.out.resolve() / "network", machine.environment()
        network = peer_environment.convert_network(python, context.run, folder, env)
        context = replace(context, peers_python=python, network=network)
    return context


def race(peers: list[Peer], rounds: int, contexts: list[Context]) -> None:
    """Run the measurements that have no row yet."""
    for number, context, peer, setting in results.jobs(peers, rounds, contexts):
        rows = results.read(context.out / results.FILE, Row)
        if (peer.name, setting.name, number) not in {(r.peer, r.setting, r.round) for r in rows}:
            row = measurement.measure(peer, setting, number, context)
            results.append(context.out / results.FILE, [row])
            line = f"{context.out.name}: " if len(contexts) > 1 else ""
            line += f"{row.peer}, {row.setting}, round {row.round}: {row.rate:.1f} images/s, "
            line += f"start {row.start:.1f} s, CPU {row.cpu_ms:.2f} ms, {row.peak:.0f} MB"
            print(f"{line}, other labels {row.others}", file=sys.stderr, flush=True)


def versions(context: Context) -> list[str]:
    """Lines with the versions here, of the peers' environment and of the older checkout."""
    lines = peer_environment.versions(context.peers_python)
    return [*lines, context.before.describe()] if context.before else lines


def require_same_settings(context: Context, kind: str, header: list[str], path: Path) -> None:
    """Refuse to mix rows of different settings or machines in one folder."""
    manifest = json.loads((context.bundle / "manifest.json").read_text())
    content = hashlib.sha256()
    for photo in context.photos:
        content.update(photo.read_bytes())
    values = {
        "machine": header[0],
        "versions": header[2],
        "bundle": f"{manifest['name']}:{manifest['version']}",
        "arch": f"{manifest['arch']} at {manifest['preprocess']['size']} px",
        "photos": f"{len(context.photos)}, {content.hexdigest()[:12]}",
        "images": str(context.images),
        "threads": str(context.threads),
        "precision": measurement.fastest(context.bundle),
        **photos.settings(kind),
    }
    machine.require_same_settings(values, path, "rows")


def show_all(folders: list[Path]) -> int:
    """Print the results of each kind of photos; 1 if a peer's answers are too often other ones."""
    wrong = [line for folder in folders for line in show(folder)]
    print("".join(f"{line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


def show(out: Path) -> list[str]:
    """Print the tables; returns the peers' disagreements."""
    rows = results.read(out / results.FILE, Row)
    if not rows:
        raise SystemExit(f"{out} holds no rows yet")
    about, command, *versions_found = (out / "machine.txt").read_text().splitlines()
    settings = json.loads((out / "settings.json").read_text())
    print(f"{about}. {settings['arch']}, {photos.describe(settings)}.\n")
    print("\n".join(f"- {item}" for item in versions_found))
    print(f"\n```text\n{command}\n```\n\n{tables.markdown(rows, settings['precision'])}")
    return results.disagreements(tables.Results(rows).peers, rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
