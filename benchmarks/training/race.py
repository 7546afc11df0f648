r"""Race Fledge against fastai and a plain torch loop: accuracy against wall clock.

    python benchmarks/training/race.py --data flowers17 --split flowers17.csv \
      --weights mobilenet_v2.pth --folds 0,1,2,3,4 --seeds 0,1 --out runs/bench-flowers17

Every run is a fresh process, timed from its start. All have the same photos, the same split, the
same weights file, the same image size and the same cores; for each fold and seed the competitors
run one after the other, in an order that rotates. fastai gets an environment of its own, made at
first use. Outcomes are appended to OUT/results.jsonl: the same command goes on with an interrupted
race, or adds folds, seeds and competitors to it.

`--markdown` trains nothing and prints the tables again. `--bare` measures epochs instead: the
whole network trained by Fledge (`fledge`), against bare steps on random tensors in the same
precision (`ours`) and in float32 (`float32`), against a float32 loop (`loop`) and against `fastai`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine, rows
from benchmarks.training import bare, contest, fastai_env, synthetic, tables
from benchmarks.training.contest import ROOT, Job, Outcome, Settings

RESULTS = "results.jsonl"


def main() -> int:
    """Run what is missing, then print; returns the exit status."""
    options = parse()
    options.peers = options.peers or ("fledge,ours,loop" if options.bare else "fledge,fastai,torch")
    out: Path = options.out
    if options.markdown:
        return show(rows.read(out / RESULTS, Outcome), out, options)
    if not (options.synthetic or (options.data and options.split)):
        raise SystemExit("name the photos: --data DIR --split CSV, or --synthetic N")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the competitor ends with us
    machine.keep_to(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    if options.synthetic:
        options.data, options.split = synthetic.write(out / "photos", options.synthetic)
    settings = settings_of(options)
    about = machine.describe(options.threads, options.device)
    (out / "machine.txt").write_text(f"{about}\n{shlex.join(['python', *sys.argv])}\n")
    print(about, file=sys.stderr)
    read_once(settings.data)
    if options.bare:
        asked = {"fledge", *rows.asked(options.peers, bare.KINDS)}
        kinds = [kind for kind in bare.KINDS if kind in asked]
        try:
            told = bare.measure(settings, out / "bare", kinds, options.bare_epochs, options.rounds)
        except contest.Failed as error:
            raise SystemExit(str(error)) from error
        print(told)
        return 0
    same_settings(settings, about, out / "settings.json")
    done = {(o.peer, o.fold, o.seed) for o in rows.read(out / RESULTS, Outcome)}
    for job in jobs(options):
        if (job.peer, job.fold, job.seed) in done:
            continue
        try:
            outcome = contest.run(job, settings, out / "runs" / job.name)
        except contest.Failed as error:
            print(f"{error}the same command goes on from here", file=sys.stderr)
            return 1
        rows.append(out / RESULTS, [outcome])
        right = outcome.right["plain"].values()
        told = f"{outcome.seconds:.1f} s, accuracy {sum(right) / len(right):.2%}"
        print(f"{job.name}: {told}", file=sys.stderr, flush=True)
    return show(rows.read(out / RESULTS, Outcome), out, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="photos, a folder a class")
    add("--split", type=Path, help="CSV path,fold; fold numbers; `test` is never touched")
    add("--synthetic", type=int, metavar="N", help="N generated photos instead, for timings alone")
    add("--weights", default="none", help="a state dict of torchvision, for all; or none")
    add("--folds", default="0", help="folds that validate, each in its turn: 0,1,2,3,4")
    add("--seeds", default="0,1")
    add("--peers", help="fledge,fastai,torch; with --bare fledge,ours,loop, float32 and fastai too")
    add("--recipe", type=Path, default=ROOT / "training/recipes/quick.toml", help="Fledge's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an override of the recipe")
    add("--arch", default="mobilenet_v2", help="or resnet50, for all")
    add("--size", type=int, default=224, help="image size, for all")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="cores that a run may use")
    add("--tta", type=int, default=10, help="views of Fledge; fastai's tta has its own; 0: none")
    add("--fastai-epochs", type=int, default=3, help="fine_tune(N), behind one frozen epoch")
    add("--fastai-batch", type=int, default=64, help="--bare takes that of the recipe for all")
    add("--fastai-channels-last", action="store_true", help="with its callback for that layout")
    add("--fastai-python", type=Path, help="an interpreter that has fastai; else one is made")
    add("--torch-epochs", type=int, default=4)
    add("--torch-batch", type=int, default=32)
    add("--bare", action="store_true", help="measure full-network epochs instead of racing")
    add("--bare-epochs", type=int, default=3, help="of each measurement; the first warms up")
    add("--rounds", type=int, default=2, help="of --bare, interleaved")
    add("--out", type=Path, default=Path("runs/bench"), help="outcomes and logs; go on here")
    add("--markdown", action="store_true", help="print the tables of OUT; train nothing")
    add("--picture", type=Path, help="default: OUT/train.png")
    add("--title", default="", help="of the picture")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """Paths made absolute, and fastai's environment made, where it takes part."""
    wanted = "fastai" in options.peers.split(",")
    given = options.fastai_python or (fastai_env.python() if wanted else Path())
    return Settings(
        data=options.data.resolve(),
        split=options.split.resolve(),
        weights=str(Path(options.weights).resolve()) if options.weights != "none" else "none",
        recipe=options.recipe.resolve(),
        overrides=tuple(options.set),
        arch=options.arch,
        size=options.size,
        device=options.device,
        threads=options.threads,
        tta=options.tta,
        fastai_python=given,
        fastai_batch=options.fastai_batch,
        fastai_epochs=options.fastai_epochs,
        fastai_channels_last=options.fastai_channels_last,
        torch_batch=options.torch_batch,
        torch_epochs=options.torch_epochs,
    )


def jobs(options: argparse.Namespace) -> list[Job]:
    """Pair by pair, every competitor first in its turn."""
    peers = rows.asked(options.peers, tables.NAMES)
    pairs = itertools.product(map(int, options.seeds.split(",")), options.folds.split(","))
    return [
        Job(peer, fold, seed)
        for turn, (seed, fold) in enumerate(pairs)
        for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]
    ]


def same_settings(settings: Settings, about: str, path: Path) -> None:
    """Refuse to mix outcomes of different settings, or of different machines."""
    values = {key: str(value) for key, value in asdict(settings).items() if key != "fastai_python"}
    values["machine"] = about
    for key in ("recipe", "split"):
        content = Path(values[key]).read_bytes()
        values[key] = f"{Path(values[key]).name} {hashlib.sha256(content).hexdigest()[:12]}"
    machine.same(values, path, "runs")


def read_once(folder: Path) -> None:
    """Have the system keep the encoded photos in memory: no competitor pays for a cold disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def show(outcomes: list[Outcome], out: Path, options: argparse.Namespace) -> int:
    """Print the tables, and draw."""
    if not outcomes:
        raise SystemExit(f"{out} holds no outcomes yet")
    about = (out / "machine.txt").read_text().splitlines()
    versions = {o.peer: o.versions for o in outcomes}
    print(f"{about[0]}.\n")
    for peer, found in versions.items():
        print(f"- {peer}: {', '.join(f'{name} {found[name]}' for name in found)}")
    print(f"\n```text\n{about[1]}\n```\n\n{tables.markdown(outcomes)}")
    path = options.picture or out / "train.png"
    tables.picture(outcomes, path, options.title or f"{options.arch} at {options.size} px")
    print(f"picture: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
