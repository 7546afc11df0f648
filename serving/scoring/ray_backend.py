"""Batch scoring on Ray Data: the same job on all machines of a cluster.

    journal ─tasks─> Ray Data: actors with a model each: load, decode, views, graph ─rows─> journal

The inputs are found, and the journal and the table are written, on the machine where the command
runs. A task is a part of a shard (1,000 inputs) with whole batches only. The batches are therefore
the same as in a run on one machine, and so are the rows. If a machine is lost, Ray starts its actor
on another machine and repeats the unfinished tasks.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.bundle import storage
from serving.errors import BundleError, DataError, FledgeError, OptionError, WorkError
from serving.inference import runtime
from serving.inference.load import choose, open_predictor
from serving.inference.predictor import Predictor
from serving.inputs.remote import is_address
from serving.inputs.tar import split
from serving.scoring import ray_cluster
from serving.scoring.job import ScoringJob
from serving.scoring.journal import SIZE, ScoringJournal
from serving.scoring.options import ScoringOptions
from serving.scoring.rows import Features, ScoreRow
from serving.scoring.scorer import Chunk, ScoredChunk, Scorer, score_chunks

_IO_THREADS: Final = 8
"""Threads per computing thread if images come from addresses, because most wait for data."""
_TASKS: Final = 16
"""Least number of tasks for each actor if there are enough images, so that all actors end at about
the same time."""
_TASK_IMAGES: Final = 32
"""Least number of images of a task, because the transfer of a task takes milliseconds."""

_ERRORS: Final[dict[str, type[FledgeError]]] = {
    "BundleError": BundleError,
    "DataError": DataError,
    "OptionError": OptionError,
    "WorkError": WorkError,
}
"""Errors that an actor reports when it can't open the model, by name; others are WorkErrors."""

Task = dict[str, Any]
"""What Ray transfers: shard and part, with names on the way to the actor, and with rows or an error
on the way back."""


class RemoteRuntime:
    """The `runtime.Runtime` of a predictor whose graph runs in the actors only."""

    def __init__(self, provider: str) -> None:
        """`provider`: the ONNX Runtime provider of the actors."""
        self.provider = provider

    def run(self, pixels: Any) -> Any:
        raise WorkError("the graph runs in the actors")


@dataclass(frozen=True)
class RayWorkerConfig:
    """Configuration of an actor.

    Attributes:
        bundle: The bundle's path on the machine of the command, for messages.
        files: Reference to the bundle's files, for `ray_cluster.get`.
        device: cpu, cuda or tensorrt.
        precision: auto, fp32, int8 or fp16.
        threads: Threads of an actor.
        folder: Folder that relative paths start from.
        sample: A local input that exists on the machine of the command and must therefore exist on
            the actor's machine; "" if there is none.
        options: The user's options.
        batch: Rows (images times views) of one run of the graph.
        protocols: Protocols that addresses may have.
    """

    bundle: str
    files: Any
    device: str
    precision: str
    threads: int
    folder: str
    sample: str
    options: ScoringOptions
    batch: int
    protocols: Sequence[str] = ()


class RayWorker:
    """An actor: loads the model once and scores one task at a time."""

    def __init__(self, config: RayWorkerConfig) -> None:
        """Open the model.

        If this fails, every task returns the error, because Ray would hide an exception here.
        """
        self._config, self._error = config, ""
        try:
            self._scorer = Scorer(
                _open_model(config),
                config.options,
                batch=config.batch,
                protocols=config.protocols,
            )
        except FledgeError as error:
            self._error = f"{type(error).__name__}:{error} (on {socket.gethostname()})"

    def __call__(self, task: Task) -> Task:
        """Score a task; returns the rows as lines of JSON and the features as bytes."""
        rows: list[ScoreRow] = []
        features: list[Features] = []
        if not self._error:
            for scored in self._score(json.loads(task["names"])):
                rows += scored.rows
                features += [] if scored.features is None else [scored.features]
        return {
            "shard": task["shard"],
            "part": task["part"],
            "error": self._error,
            "rows": "".join(row.to_json() for row in rows),
            "features": np.concatenate(features).tobytes() if features else b"",
        }

    def _score(self, names: list[str]) -> Iterator[ScoredChunk]:
        size = self._scorer.chunk_size
        chunks = (Chunk(0, names[at : at + size], False) for at in range(0, len(names), size))
        threads = self._config.threads * (_IO_THREADS if any(map(is_address, names)) else 1)
        if threads == 1:
            return map(self._scorer, chunks)
        return score_chunks(self._scorer, chunks, threads)


def _open_model(config: RayWorkerConfig) -> Predictor:
    """The predictor of an actor, from the bundle's files in Ray's object store."""
    if os.path.isdir(config.folder):
        os.chdir(config.folder)
    if config.sample and not os.path.exists(config.sample):
        raise OptionError(
            f"{config.sample} is not there: every machine of the cluster must see the images under "
            "the same path; share the folder, or give addresses such as s3://"
        )
    with tempfile.TemporaryDirectory(prefix="fledge-") as folder:
        for name, data in ray_cluster.get(config.files).items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            return open_predictor(Path(folder), device=config.device, precision=config.precision)
        except FledgeError as error:
            raise type(error)(str(error).replace(folder, config.bundle)) from error


class RayBackend:
    """Actors on the cluster at RAY_ADDRESS, or on a cluster that is started for this job."""

    def __init__(self, options: ScoringOptions, log: Callable[[str], None]) -> None:
        """Check the installation; nothing is started yet.

        Raises:
            OptionError: ray is not installed.
        """
        ray_cluster.check_installed()
        self._options, self._log = options, log

    def __enter__(self) -> RayBackend:
        return self

    def __exit__(self, *_: object) -> None:
        ray_cluster.disconnect()

    def open(self, bundle: Path, *, device: str, precision: str, threads: int | None) -> Predictor:
        """Connect to the cluster; returns a predictor with the properties of those in the actors.

        Args:
            bundle: The bundle, whose files are sent to the actors.
            device: auto takes GPUs if the cluster has any; an actor that can't use its GPU fails.
            precision: As for `open_predictor`.
            threads: Ignored, because an actor on a CPU has one core.

        Raises:
            BundleError, OptionError: The bundle or an option can't be used. Only what can be
                checked on this machine is checked here; the actors check the rest.
            WorkError: No cluster at the address, or no CPUs or GPUs in it.
        """
        if device not in ("auto", *runtime.PROVIDERS):
            raise OptionError(f"device = {device!r}: use auto, {', '.join(runtime.PROVIDERS)}")
        self._bundle = storage.read(bundle)
        self._pool = ray_cluster.connect(device, self._options.workers)
        provider = runtime.PROVIDERS[self._pool.device]
        self._precision = choose(self._bundle, precision, provider)
        return Predictor(self._bundle.manifest, RemoteRuntime(provider), self._precision)

    def run(self, job: ScoringJob) -> None:
        """Score the incomplete shards on the actors.

        Raises:
            FledgeError: An actor failed; complete shards are kept.
        """
        images_per_run = job.options.images_per_run(job.batch)
        tasks = list(_tasks(job.journal, images_per_run, self._pool.workers))
        if not tasks:
            return
        config = self._worker_config(job, tasks[0])
        shards = _ShardAssembler(job.journal, Counter(task["shard"] for task in tasks))
        try:
            with closing(self._pool.map(RayWorker, config, tasks, self._log)) as results:
                for result in results:
                    if result["error"]:
                        kind, _, message = result["error"].partition(":")
                        raise _ERRORS.get(kind, WorkError)(message)
                    for row in shards.add(result):
                        job.progress.step(failed=row.status == "error")
        except OptionError:
            if not job.journal.done:
                job.journal.remove()  # so that the next command may have other options
            raise

    def _worker_config(self, job: ScoringJob, task: Task) -> RayWorkerConfig:
        names = [name for name in json.loads(task["names"]) if not is_address(name)]
        members = (split(name) or (name, "") for name in names)
        sample = next((path for path, _ in members if os.path.exists(path)), "")
        return RayWorkerConfig(
            str(self._bundle.folder),
            ray_cluster.put(_bundle_files(self._bundle)),
            self._pool.device,
            self._precision,
            self._pool.threads,
            os.getcwd(),
            sample and os.path.abspath(sample),
            job.options,
            job.batch,
            job.protocols,
        )


class _ShardAssembler:
    """Collects the parts of shards, which arrive in any order, and writes complete shards."""

    def __init__(self, journal: ScoringJournal, parts: Counter[int]) -> None:
        """`parts`: shard -> number of its parts."""
        self._journal, self._parts = journal, parts
        self._received: dict[int, dict[int, tuple[list[ScoreRow], Features | None]]] = {}

    def add(self, result: Task) -> list[ScoreRow]:
        """Add a part, write the shard if it is complete now, and return the part's rows."""
        rows = [ScoreRow.from_json(line) for line in result["rows"].splitlines()]
        features = np.frombuffer(result["features"], np.float32).reshape(len(rows), -1)
        shard, part = result["shard"], result["part"]
        received = self._received.setdefault(shard, {})
        received[part] = rows, features if result["features"] else None
        if len(received) == self._parts[shard]:
            self._write(shard, [received[part] for part in sorted(received)])
            del self._received[shard]
        return rows

    def _write(self, shard: int, parts: list[tuple[list[ScoreRow], Features | None]]) -> None:
        rows = [row for part, _ in parts for row in part]
        features = [part for _, part in parts if part is not None]
        self._journal.write(shard, rows, np.concatenate(features) if features else None)


def _tasks(journal: ScoringJournal, batch: int, workers: int) -> Iterator[Task]:
    """Parts of the incomplete shards, in whole batches of `batch` images.

    The names are JSON, because Ray can't transfer strings that are not UTF-8.
    """
    left = journal.total - journal.done
    images = min(max(_TASK_IMAGES, left // (workers * _TASKS)), SIZE)
    size = max(1, images // batch) * batch
    for shard, names in journal.todo():
        for at in range(0, len(names), size):
            part = names[at : at + size]
            yield {"shard": shard, "part": at, "images": len(part), "names": json.dumps(part)}


def _bundle_files(bundle: storage.Bundle) -> dict[str, bytes]:
    """All files of a bundle, by their paths in its folder."""
    top = (storage.MANIFEST, storage.CHECKSUM, storage.SIGNATURE)
    files = {
        name: (bundle.folder / name).read_bytes() for name in top if (bundle.folder / name).exists()
    }
    version = bundle.payload.name
    return files | {f"{version}/{name}": bundle.load(name) for name in bundle.manifest.files}
