"""What an epoch of the whole network costs: against bare arithmetic, plain float32, and fastai."""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from benchmarks.training import contest
from benchmarks.training.contest import PEERS, ROOT, Job, Settings

KINDS: Final = {
    "fledge": "Fledge, nothing frozen",
    "ours": "bare steps, same precision and layout",
    "loop": "plain float32 loop, photos by worker processes",
    "float32": "bare float32 steps, contiguous",
    "fastai": "fastai, nothing frozen",
}


def measure(settings: Settings, folder: Path, kinds: list[str], epochs: int, rounds: int) -> str:
    """Markdown: seconds an epoch of each of `kinds`, of which Fledge is one, and its ratio to each.

    Kinds take turns, each time in a fresh process of `epochs` epochs; the first, in which kernels
    are made and memory is found, does not count. Ratios are of one round; the table has their
    median. Seconds have the validation in them; photos a second are those that are trained on.
    """
    import tomli_w

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "recipe.toml"
    values = whole_network(settings, epochs)
    recipe.write_text(tomli_w.dumps(values), encoding="utf-8")
    batch = values.get("batch_size", 32)
    if not isinstance(batch, int):
        raise SystemExit(f"batch_size = {batch!r}: give a number by --set batch_size=32, for all")
    settings = replace(settings, fastai_epochs=epochs, fastai_batch=batch, tta=0)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    counts = (0, 0, 0)
    for number in range(rounds):
        turn = number % len(kinds)  # Fledge comes first at first: it says how many photos there are
        for kind in kinds[turn:] + kinds[:turn]:
            place = folder / f"{kind}-{number}"
            if kind == "fledge":
                found, counts = _fledge(settings, recipe, place)
            elif kind == "loop":
                found = _loop(settings, place, batch, epochs)
            elif kind == "fastai":
                ends = contest.run(Job(kind, "0", number), settings, place).epochs
                found = [later - sooner for (sooner, _), (later, _) in pairwise(ends)]
            else:
                train, valid, classes = map(str, counts)
                words = [str(PEERS / "bare_steps.py"), kind, str(recipe), "--train", train]
                words += ["--valid", valid, "--classes", classes]
                words += ["--epochs", str(epochs), "--device", settings.device]
                found = [line["seconds"] for line in _run(words, place)]
            seconds[kind].append(statistics.mean(found[1:] or found))
            print(f"{kind}: {seconds[kind][-1]:.2f} s an epoch", file=sys.stderr, flush=True)
    train, valid, _ = counts
    lines = [
        f"{settings.arch} at {settings.size} px in batches of {batch}, {train:,} photos to train "
        f"on, {valid:,} to validate.\n",
        "| | s an epoch | photos/s | Fledge to it |",
        "|---|---:|---:|---:|",
    ]
    for kind in kinds:
        ratios = [
            ours / other for ours, other in zip(seconds["fledge"], seconds[kind], strict=True)
        ]
        ratio = "" if kind == "fledge" else f"{statistics.median(ratios):.3f}"
        middle = statistics.median(seconds[kind])
        lines.append(f"| {KINDS[kind]} | {middle:.2f} | {train / middle:,.0f} | {ratio} |")
    return "\n".join(lines)


def whole_network(settings: Settings, epochs: int) -> dict[str, Any]:
    """The recipe with one stage left: the one that trains all, or else one that does."""
    values: dict[str, Any] = tomllib.loads(settings.recipe.read_text(encoding="utf-8"))
    stages = [stage for stage in values["stage"] if stage.get("unfreeze") == "all"]
    stage = stages[0] if stages else {"lr": 0.0002, "lr_divide": 2}
    stage |= {"name": "all", "unfreeze": "all", "cycles": 1, "cycle_len": epochs, "cycle_mult": 1}
    if stage.get("lr") == "find":
        stage["lr"] = 0.0002
    values |= {"arch": settings.arch, "weights": settings.weights, "stage": [stage]}
    values["preprocess"] = {**values.get("preprocess", {}), "size": settings.size}
    for override in settings.overrides:
        key, _, text = override.partition("=")
        *sections, last = key.split(".")
        place = values
        for name in sections:
            place = place.setdefault(name, {})
        try:
            place[last] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            place[last] = text
    return values


def _fledge(
    settings: Settings, recipe: Path, place: Path
) -> tuple[list[float], tuple[int, int, int]]:
    """Seconds of every epoch by metrics.csv, and how many photos, held out ones, and classes."""
    words = ["train", str(recipe), "--data", str(settings.data), "--split", str(settings.split)]
    words += ["--device", settings.device, "--out", str(place)]
    _run([str(ROOT / "fledge.py"), *words], place.with_suffix(".log"))
    with (place / "metrics.csv").open(newline="") as file:
        found = [float(row["seconds"]) for row in csv.DictReader(file)]
    best = json.loads((place / "best.json").read_text())
    photos = best["data"]
    shutil.rmtree(place)
    return found, (photos["train"], photos["valid"], len(best["classes"]))


def _loop(settings: Settings, place: Path, batch: int, epochs: int) -> list[float]:
    place.mkdir(parents=True, exist_ok=True)
    words = ["--data", str(settings.data), "--split", str(settings.split), "--fold", "0"]
    words += ["--weights", settings.weights, "--arch", settings.arch, "--size", str(settings.size)]
    words += ["--batch", str(batch), "--epochs", str(epochs)]
    words += ["--workers", str(settings.threads), "--device", settings.device, "--out", str(place)]
    told = _run([str(PEERS / "torch_loop.py"), *words], place)
    return [line["seconds"] for line in told if line.get("event") == "epoch"]


def _run(words: list[str], place: Path) -> list[dict[str, Any]]:
    """The JSON lines that a script of ours writes."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "FLEDGE_CACHE": f"{place}-cache"}
    done = subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, check=False
    )
    shutil.rmtree(f"{place}-cache", ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
