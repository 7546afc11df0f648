"""Train one competitor on one fold with one seed, in a fresh process, and time it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import PEERS_FOLDER, ROOT

POLL: Final = 0.02
"""Seconds between two looks at metrics.csv."""


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of one benchmark share; batches and epochs are the peers'."""

    data: Path
    split: Path
    weights: str
    recipe: Path
    overrides: tuple[str, ...]
    arch: str
    size: int
    device: str
    threads: int
    tta: int
    fastai_python: Path
    fastai_batch: int
    fastai_epochs: int
    fastai_channels_last: bool
    torch_batch: int
    torch_epochs: int


@dataclass(frozen=True)
class Job:
    """One measurement: competitor, fold, seed."""

    peer: str
    fold: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.peer}-fold{self.fold}-seed{self.seed}"


@dataclass
class Outcome:
    """Result of a run; a line of results.jsonl.

    Attributes:
        peer: Name of the competitor.
        fold: Name of the validation fold.
        seed: Of the run.
        seconds: From the start of the process to a trained model on disk.
        epochs: [seconds since the start, validation accuracy] at the end of each epoch.
        tta_seconds: Additional seconds of test-time augmentation.
        photos: Numbers of training and validation photos.
        right: Whether each validation photo was classified right, by path, for "plain" and "tta".
        versions: Of its packages.
    """

    peer: str
    fold: str
    seed: int
    seconds: float = 0.0
    epochs: list[tuple[float, float]] = field(default_factory=list)
    tta_seconds: float = 0.0
    photos: tuple[int, int] = (0, 0)
    right: dict[str, dict[str, bool]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Failed(Exception):
    """A competitor failed; the message names its log."""


def measure(job: Job, settings: Settings, folder: Path) -> Outcome:
    """Run a competitor to its end in a folder that is emptied before.

    Raises:
        Failed: Its exit status was not 0.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cache = folder / "cache"  # empty, so that every run decodes its photos
    env = {**os.environ, "FLEDGE_CACHE": str(cache), "PYTHONPATH": _python_path(job)}
    outcome = Outcome(job.peer, job.fold, job.seed)
    (_run_fledge if job.peer == "fledge" else _run_peer)(job, settings, folder, env, outcome)
    for views in ("plain", "tta"):
        if (folder / f"{views}.csv").exists():
            outcome.right[views] = _right(folder / f"{views}.csv")
    for path in (cache, folder / "run", folder / "model.pkl", folder / "model.pth"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return outcome


def _python_path(job: Job) -> str:
    """PYTHONPATH with the repository for Fledge; other environments must not see it."""
    inherited = os.environ.get("PYTHONPATH", "")
    own = [str(ROOT)] if job.peer == "fledge" else []
    return os.pathsep.join([*own, *([inherited] if inherited else [])])


def _run_fledge(
    job: Job, settings: Settings, folder: Path, env: Mapping[str, str], outcome: Outcome
) -> None:
    run_folder = folder / "run"
    fledge = [sys.executable, str(ROOT / "fledge.py")]
    command = [
        *(*fledge, "train", str(settings.recipe), "--data", str(settings.data)),
        *("--split", str(settings.split), "--weights", settings.weights),
        *("--seed", str(job.seed), "--device", settings.device, "--out", str(run_folder)),
        *(f"data.fold={job.fold}", f"arch={settings.arch}", f"preprocess.size={settings.size}"),
        *settings.overrides,
    ]
    with (folder / "log").open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, process_group=0)
        with _killed_on_exit(process):
            ended = False
            while not ended:
                time.sleep(POLL)
                ended = process.poll() is not None
                now = time.perf_counter() - started
                rows = _complete_rows(run_folder / "metrics.csv")[len(outcome.epochs) :]
                outcome.epochs += [(now, float(row["accuracy"])) for row in rows]
            outcome.seconds = now
        _check(process.returncode, folder)
    best = json.loads((run_folder / "best.json").read_text())
    outcome.versions = best["versions"]
    outcome.photos = (best["data"]["train"], best["data"]["valid"])
    evaluate = [*fledge, "evaluate", str(run_folder)]
    _run([*evaluate, "--csv", str(folder / "plain.csv")], env, folder)
    if settings.tta:
        averaged = ["--tta", str(settings.tta), "--csv", str(folder / "tta.csv")]
        outcome.tta_seconds = _run([*evaluate, *averaged], env, folder)


def _complete_rows(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv whose line is complete."""
    if not path.exists():
        return []
    text = path.read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _run_peer(
    job: Job, settings: Settings, folder: Path, env: Mapping[str, str], outcome: Outcome
) -> None:
    fastai = job.peer == "fastai"
    command: Sequence[str] = [
        str(settings.fastai_python if fastai else sys.executable),
        str(PEERS_FOLDER / ("fastai_finetune.py" if fastai else "torch_loop.py")),
        *("--data", str(settings.data), "--split", str(settings.split), "--fold", job.fold),
        *("--seed", str(job.seed), "--weights", settings.weights, "--arch", settings.arch),
        *("--size", str(settings.size), "--workers", str(settings.threads)),
        *("--batch", str(settings.fastai_batch if fastai else settings.torch_batch)),
        *("--epochs", str(settings.fastai_epochs if fastai else settings.torch_epochs)),
        *("--device", settings.device, "--tta", str(settings.tta), "--out", str(folder)),
        *(["--channels-last"] if fastai and settings.fastai_channels_last else []),
    ]
    answered: dict[str, float] = {}
    with (folder / "log").open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=log, text=True, process_group=0
        )
        with _killed_on_exit(process):
            for line in process.stdout or ():
                now = time.perf_counter() - started
                if not line.startswith('{"event"'):
                    log.write(line)
                    continue
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "begin":
                    outcome.photos = (event["train"], event["valid"])
                elif event["event"] == "epoch":
                    outcome.epochs.append((now, event["accuracy"]))
                elif event["event"] == "done":
                    outcome.seconds, outcome.versions = now, event["versions"]
                elif event["event"] == "answered":
                    answered[event["views"]] = now
            process.wait()
        _check(process.returncode, folder)
    if "tta" in answered:
        outcome.tta_seconds = answered["tta"] - answered["plain"]


@contextmanager
def _killed_on_exit(process: subprocess.Popen[Any]) -> Iterator[None]:
    """On any exit, kill the process and its workers: they would disturb the next competitor."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _run(command: Sequence[str], env: Mapping[str, str], folder: Path) -> float:
    """Run a command to its end; returns its seconds.

    Raises:
        Failed: Its exit status was not 0.
    """
    with (folder / "log").open("a") as log:
        started = time.perf_counter()
        done = subprocess.run(command, env=env, stdout=log, stderr=log, check=False)
        _check(done.returncode, folder)
    return time.perf_counter() - started


def _check(status: int, folder: Path) -> None:
    if status:
        tail = "".join((folder / "log").read_text().splitlines(keepends=True)[-12:])
        raise Failed(f"{folder.name} ended with status {status}; {folder / 'log'} ends:\n{tail}")


def _right(path: Path) -> dict[str, bool]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["label"] == row["predicted"] for row in csv.DictReader(file)}
