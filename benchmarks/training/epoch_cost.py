"""Seconds per epoch of the whole network: Fledge, bare training steps, a plain loop, fastai."""

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

from benchmarks.machine import PEERS_FOLDER, ROOT
from benchmarks.training import measurement
from benchmarks.training.measurement import Job, Settings

KINDS: Final = {
    "fledge": "Fledge, nothing frozen",
    "ours": "bare steps, same precision and layout",
    "loop": "plain float32 loop, photos by worker processes",
    "float32": "bare float32 steps, contiguous",
    "fastai": "fastai, nothing frozen",
}


def measure(settings: Settings, folder: Path, kinds: list[str], epochs: int, rounds: int) -> str:
    """Markdown: seconds per epoch of each of `kinds`, and the ratio of Fledge's to each.

    `kinds` includes `fledge`. The kinds take turns, each time in a fresh process of `epochs`
    epochs; the first epoch, which compiles kernels and allocates memory, is not counted. A ratio
    compares two kinds in the same round; the table has the median over the rounds. Seconds include
    validation; photos/s counts training photos.
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
        # The first round starts with Fledge, which returns the number of photos.
        turn = number % len(kinds)
        for kind in kinds[turn:] + kinds[:turn]:
            run_folder = folder / f"{kind}-{number}"
            if kind == "fledge":
                found, counts = _fledge(settings, recipe, run_folder)
            elif kind == "loop":
                found = _loop(settings, run_folder, batch, epochs)
            elif kind == "fastai":
                job = Job(kind, "0", number)
                ends = measurement.measure(job, settings, run_folder).epochs
                found = [end - start for (start, _), (end, _) in pairwise(ends)]
            else:
                train, valid, classes = map(str, counts)
                arguments = [
                    str(PEERS_FOLDER / "bare_steps.py"),
                    kind,
                    str(recipe),
                    "--train",
                    train,
                ]
                arguments += ["--valid", valid, "--classes", classes]
                arguments += ["--epochs", str(epochs), "--device", settings.device]
                found = [line["seconds"] for line in _run(arguments, run_folder)]
            seconds[kind].append(statistics.mean(found[1:] or found))
            print(f"{kind}: {seconds[kind][-1]:.2f} s per epoch", file=sys.stderr, flush=True)
    train, valid, _ = counts
    lines = [
        f"{settings.arch} at {settings.size} px in batches of {batch}, {train:,} training photos, "
        f"{valid:,} validation photos.\n",
        "| | s per epoch | photos/s | Fledge / it |",
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
    """The recipe with a single stage, which trains all layers: its own if it has one."""
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
        table = values
        for name in sections:
            table = table.setdefault(name, {})
        try:
            table[last] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            table[last] = text
    return values


def _fledge(
    settings: Settings, recipe: Path, run_folder: Path
) -> tuple[list[float], tuple[int, int, int]]:
    """Seconds per epoch from metrics.csv; numbers of training photos, held-out photos, classes."""
    arguments = ["train", str(recipe), "--data", str(settings.data)]
    arguments += ["--split", str(settings.split), "--device", settings.device]
    arguments += ["--out", str(run_folder)]
    _run([str(ROOT / "fledge.py"), *arguments], run_folder.with_suffix(".log"))
    with (run_folder / "metrics.csv").open(newline="") as file:
        found = [float(row["seconds"]) for row in csv.DictReader(file)]
    best = json.loads((run_folder / "best.json").read_text())
    photos = best["data"]
    shutil.rmtree(run_folder)
    return found, (photos["train"], photos["valid"], len(best["classes"]))


def _loop(settings: Settings, out: Path, batch: int, epochs: int) -> list[float]:
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["--data", str(settings.data), "--split", str(settings.split), "--fold", "0"]
    arguments += ["--weights", settings.weights, "--arch", settings.arch]
    arguments += ["--size", str(settings.size), "--batch", str(batch), "--epochs", str(epochs)]
    arguments += ["--workers", str(settings.threads), "--device", settings.device]
    events = _run([str(PEERS_FOLDER / "torch_loop.py"), *arguments, "--out", str(out)], out)
    return [event["seconds"] for event in events if event.get("event") == "epoch"]


def _run(arguments: list[str], out: Path) -> list[dict[str, Any]]:
    """Run a Python program with an empty cache beside `out`; the JSON lines of its stdout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "FLEDGE_CACHE": f"{out}-cache"}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=False
    )
    shutil.rmtree(f"{out}-cache", ignore_errors=True)
    if done.returncode:
        raise SystemExit(
            f"{arguments[0]} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
