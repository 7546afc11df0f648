"""One competitor, one fold, one seed: a fresh process, and what it told by our clock."""

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

ROOT: Final = Path(__file__).resolve().parents[2]
PEERS: Final = ROOT / "benchmarks" / "peers"
TICK: Final = 0.02


@dataclass(frozen=True)
class Settings:
    """What all runs of one benchmark have in common. Batches and epochs are the peers'."""

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
    """Which competitor on which photos."""

    peer: str
    fold: str
    seed: int

    @property
    def name(self) -> str:
        """For a person and for a folder."""
        return f"{self.peer}-fold{self.fold}-seed{self.seed}"


@dataclass
class Outcome:
    """What a run came to; a line of results.jsonl.

    seconds: from the start of the process to a trained model on disk. epochs: [seconds, accuracy]
    at the end of each. tta_seconds: what the averaged answers took on top. right: whether each
    validation photo was, by "plain" and "tta". photos: [trained on, validated].
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
    """A competitor ended with an error; the message names its log."""


def run(job: Job, settings: Settings, folder: Path) -> Outcome:
    """Run a competitor to its end in an empty folder.

    Raises:
        Failed: It ended with an error.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cache = folder / "cache"  # empty: every run decodes for itself
    env = {**os.environ, "FLEDGE_CACHE": str(cache), "PYTHONPATH": _python_path(job)}
    outcome = Outcome(job.peer, job.fold, job.seed)
    (_fledge if job.peer == "fledge" else _peer)(job, settings, folder, env, outcome)
    for views in ("plain", "tta"):
        if (folder / f"{views}.csv").exists():
            outcome.right[views] = _right(folder / f"{views}.csv")
    for made in (cache, folder / "run", folder / "model.pkl", folder / "model.pth"):
        shutil.rmtree(made, ignore_errors=True) if made.is_dir() else made.unlink(missing_ok=True)
    return outcome


def _python_path(job: Job) -> str:
    """Ours for ourselves alone: fastai's environment stays its own."""
    given = os.environ.get("PYTHONPATH", "")
    ours = [str(ROOT)] if job.peer == "fledge" else []
    return os.pathsep.join([*ours, *([given] if given else [])])


def _fledge(
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
        with _ending_with_us(process):
            ended = False
            while not ended:
                time.sleep(TICK)
                ended = process.poll() is not None
                now = time.perf_counter() - started
                rows = _rows(run_folder / "metrics.csv")[len(outcome.epochs) :]
                outcome.epochs += [(now, float(row["accuracy"])) for row in rows]
            outcome.seconds = now
        _check(process.returncode, folder)
    best = json.loads((run_folder / "best.json").read_text())
    outcome.versions = best["versions"]
    outcome.photos = (best["data"]["train"], best["data"]["valid"])
    evaluate = [*fledge, "evaluate", str(run_folder)]
    _once([*evaluate, "--csv", str(folder / "plain.csv")], env, folder)
    if settings.tta:
        averaged = ["--tta", str(settings.tta), "--csv", str(folder / "tta.csv")]
        outcome.tta_seconds = _once([*evaluate, *averaged], env, folder)


def _rows(path: Path) -> list[dict[str, str]]:
    """The whole lines of metrics.csv."""
    if not path.exists():
        return []
    text = path.read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _peer(
    job: Job, settings: Settings, folder: Path, env: Mapping[str, str], outcome: Outcome
) -> None:
    fastai = job.peer == "fastai"
    command: Sequence[str] = [
        str(settings.fastai_python if fastai else sys.executable),
        str(PEERS / ("fastai_finetune.py" if fastai else "torch_loop.py")),
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
        with _ending_with_us(process):
            for line in process.stdout or ():
                now = time.perf_counter() - started
                if not line.startswith('{"event"'):
                    log.write(line)
                    continue
                told: dict[str, Any] = json.loads(line)
                if told["event"] == "begin":
                    outcome.photos = (told["train"], told["valid"])
                elif told["event"] == "epoch":
                    outcome.epochs.append((now, told["accuracy"]))
                elif told["event"] == "done":
                    outcome.seconds, outcome.versions = now, told["versions"]
                elif told["event"] == "answered":
                    answered[told["views"]] = now
            process.wait()
        _check(process.returncode, folder)
    if "tta" in answered:
        outcome.tta_seconds = answered["tta"] - answered["plain"]


@contextmanager
def _ending_with_us(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Leave no competitor behind, nor its workers, to disturb the next: never two at once."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _once(command: Sequence[str], env: Mapping[str, str], folder: Path) -> float:
    """Run a command to its end; returns its seconds."""
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
