r"""Race Fledge against fastai and a plain torch loop: accuracy against wall clock.

    python -m benchmarks.training.race --data flowers17 --split flowers17.csv \
      --weights mobilenet_v2.pth --folds 0,1,2,3,4 --seeds 0,1 --out runs/bench-flowers17

Every run is a fresh process, timed from its start. All competitors have the same photos, split,
weights file, image size and cores. For each fold and seed they run one after the other, in an order
that rotates. fastai runs in its own virtual environment, which is created at first use. Outcomes
are appended to OUT/results.jsonl: the same command resumes an interrupted race, or adds folds,
seeds and competitors to it.

`--markdown` trains nothing and prints the tables of OUT. `--bare` measures seconds per epoch
instead, with the whole network trained: Fledge (`fledge`), bare steps on random tensors in the same
precision (`ours`) and in float32 (`float32`), a float32 loop (`loop`) and `fastai`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine, results
from benchmarks.machine import ROOT
from benchmarks.training import epoch_cost, fastai_environment, measurement, synthetic, tables
from benchmarks.training.measurement import Job, Outcome, Settings


def main() -> int:
    """Run the jobs that have no outcome yet, then print; returns the exit status."""
    options = parse()
    options.peers = options.peers or ("fledge,ours,loop" if options.bare else "fledge,fastai,torch")
    out: Path = options.out
    if options.markdown:
        return show(results.read(out / results.FILE, Outcome), out, options)
    if not (options.synthetic or (options.data and options.split)):
        raise SystemExit("name the photos: --data DIR --split CSV, or --synthetic N")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the competitor is killed
    machine.limit_cores(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    if options.synthetic:
        options.data, options.split = synthetic.write(out / "photos", options.synthetic)
    settings = settings_of(options)
    about = machine.describe(options.threads, options.device)
    command = machine.command("benchmarks.training.race")
    (out / "machine.txt").write_text(f"{about}\n{command}\n")
    print(about, file=sys.stderr)
    warm_page_cache(settings.data)
    if options.bare:
        requested = {"fledge", *results.parse_names(options.peers, epoch_cost.KINDS, "--peers")}
        kinds = [kind for kind in epoch_cost.KINDS if kind in requested]
        epochs, rounds = options.bare_epochs, options.rounds
        try:
            print(epoch_cost.measure(settings, out / "bare", kinds, epochs, rounds))
        except measurement.Failed as error:
            raise SystemExit(str(error)) from error
        return 0
    require_same_settings(settings, about, out / "settings.json")
    done = {(o.peer, o.fold, o.seed) for o in results.read(out / results.FILE, Outcome)}
    for job in jobs(options):
        if (job.peer, job.fold, job.seed) in done:
            continue
        try:
            outcome = measurement.measure(job, settings, out / "runs" / job.name)
        except measurement.Failed as error:
            print(f"{error}the same command resumes here", file=sys.stderr)
            return 1
        results.append(out / results.FILE, [outcome])
        right = outcome.right["plain"].values()
        line = f"{outcome.seconds:.1f} s, accuracy {sum(right) / len(right):.2%}"
        print(f"{job.name}: {line}", file=sys.stderr, flush=True)
    return show(results.read(out / results.FILE, Outcome), out, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="photos, one folder per class")
    add("--split", type=Path, help="CSV path,fold; rows with fold `test` are not used")
    add("--synthetic", type=int, metavar="N", help="use N generated photos; for timings only")
    add("--weights", default="none", help="a torchvision state dict for all competitors; or none")
    add("--folds", default="0", help="validation folds: 0,1,2,3,4")
    add("--seeds", default="0,1")
    add("--peers", help="fledge,fastai,torch; with --bare fledge,ours,loop, float32 and fastai too")
    add("--recipe", type=Path, default=ROOT / "training/recipes/quick.toml", help="of Fledge")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an override of the recipe")
    add("--arch", default="mobilenet_v2", help="or resnet50, for all")
    add("--size", type=int, default=224, help="image size, for all")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="cores of each run")
    add("--tta", type=int, default=10, help="views of Fledge, 0 for none; fastai uses its default")
    add("--fastai-epochs", type=int, default=3, help="fine_tune(N), after one frozen epoch")
    add("--fastai-batch", type=int, default=64, help="--bare uses the recipe's for all")
    add("--fastai-channels-last", action="store_true", help="use its channels-last callback")
    add("--fastai-python", type=Path, help="an interpreter with fastai; default: create one")
    add("--torch-epochs", type=int, default=4)
    add("--torch-batch", type=int, default=32)
    add("--bare", action="store_true", help="measure seconds per epoch instead of racing")
    add("--bare-epochs", type=int, default=3, help="of each measurement; the first is not counted")
    add("--rounds", type=int, default=2, help="of --bare, interleaved")
    add("--out", type=Path, default=Path("runs/bench"), help="outcomes and logs; races resume here")
    add("--markdown", action="store_true", help="print the tables of OUT; train nothing")
    add("--picture", type=Path, help="default: OUT/train.png")
    add("--title", default="", help="of the picture")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings with absolute paths; creates fastai's environment if fastai takes part."""
    wanted = "fastai" in options.peers.split(",")
    fastai_python = options.fastai_python or (fastai_environment.python() if wanted else Path())
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
        fastai_python=fastai_python,
        fastai_batch=options.fastai_batch,
        fastai_epochs=options.fastai_epochs,
        fastai_channels_last=options.fastai_channels_last,
        torch_batch=options.torch_batch,
        torch_epochs=options.torch_epochs,
    )


def jobs(options: argparse.Namespace) -> list[Job]:
    """All jobs, by seed and fold; each pair starts with the next competitor."""
    peers = results.parse_names(options.peers, tables.NAMES, "--peers")
    pairs = itertools.product(map(int, options.seeds.split(",")), options.folds.split(","))
    return [
        Job(peer, fold, seed)
        for turn, (seed, fold) in enumerate(pairs)
        for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]
    ]


def require_same_settings(settings: Settings, about: str, path: Path) -> None:
    """Refuse to mix outcomes of different settings or machines in one folder."""
    values = {key: str(value) for key, value in asdict(settings).items() if key != "fastai_python"}
    values["machine"] = about
    for key in ("recipe", "split"):
        content = Path(values[key]).read_bytes()
        values[key] = f"{Path(values[key]).name} {hashlib.sha256(content).hexdigest()[:12]}"
    machine.require_same_settings(values, path, "runs")


def warm_page_cache(folder: Path) -> None:
    """Read all files once, so that no competitor waits for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def show(outcomes: list[Outcome], out: Path, options: argparse.Namespace) -> int:
    """Print the tables and draw the picture."""
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
