"""Batch scoring on Ray Data: one job runs on all machines of a Ray cluster.

    1. The machine that runs the command finds the images and divides them into tasks.
    2. Ray actors, each with a copy of the model, load, decode and score the images of a task.
    3. The machine that runs the command writes the rows to the journal, and then the table.

A task is a slice of a shard (1,000 images) and contains only complete batches, except at the end of
the shard. The batches are therefore the same as on a single machine, and so are the rows. If a
machine is lost, Ray starts its actor on another machine and repeats the unfinished tasks.
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
from serving.inputs.archives import split
from serving.inputs.remote import is_address
from serving.scoring import ray_cluster
from serving.scoring.job import ScoringJob
from serving.scoring.journal import SIZE, ScoringJournal
from serving.scoring.options import ScoringOptions
from serving.scoring.rows import Features, ScoreRow
from serving.scoring.scorer import Chunk, ScoredChunk, Scorer, score_chunks
from serving.utils.json_reader import MAX_BYTES
from serving.utils.regular_files import read_limited

_IO_THREADS: Final = 8
"""Factor for the number of threads if images are downloaded, because most threads then wait."""
_TASKS: Final = 16
"""Smallest number of tasks for each actor if there are enough images. With many small tasks, all
actors finish at about the same time."""
_TASK_IMAGES: Final = 32
"""Smallest number of images in a task, because the transfer of a task takes milliseconds."""

_ERRORS: Final[dict[str, type[FledgeError]]] = {
    "BundleError": BundleError,
    "DataError": DataError,
    "OptionError": OptionError,
    "WorkError": WorkError,
}
"""Error classes by name, for errors that an actor reports when it can't open the model. Other
errors are reported as WorkError."""

Task = dict[str, Any]
"""A slice of a shard, as transferred by Ray. A task sent to an actor has the names of the images.
A task returned by an actor has the rows or an error."""


class RemoteRuntime:
    """Placeholder runtime for the local predictor.

    It describes the model, but the ONNX graph itself runs only in the Ray actors.
    """

    def __init__(self, provider: str) -> None:
        """Store the provider.

        Args:
            provider: Name of the ONNX Runtime execution provider that the actors use.
        """
        self.provider = provider

    def run(self, pixels: Any) -> Any:
        raise WorkError("the graph runs in the actors")


@dataclass(frozen=True)
class RayWorkerConfig:
    """Configuration of the Ray actors.

    Attributes:
        bundle: Path of the bundle on the machine that runs the command, for error messages.
        files: Ray object reference to the contents of the bundle's files.
        device: cpu, cuda or tensorrt.
        precision: fp32, int8 or fp16.
        threads: Number of threads of each actor.
        folder: Working directory of the command, from which relative paths start.
        sample: Path of a local input. Each actor checks that the path exists on its machine too. ""
            if there are no local inputs.
        options: Options of `fledge score`.
        batch: Number of TTA views in one run of the graph, counted over all images.
        protocols: Protocols that addresses of images may have, such as "s3".
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
    """Ray actor that opens the model once and then scores one task at a time."""

    def __init__(self, config: RayWorkerConfig) -> None:
        """Open the model.

        If this fails, the error is stored and returned for every task. Ray would hide an exception
        that is raised here.
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
        """Score the images of a task.

        Returns:
            The task with its rows as lines of JSON and its features as bytes, or with an error.
        """
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
    """Return the predictor of an actor, opened from the bundle's files in Ray's object store."""
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
    """Scoring engine that runs on a Ray cluster.

    A context manager. The cluster is the one at the address in the environment variable
    RAY_ADDRESS. If it is not set, a cluster is started on this machine for this job.
    """

    def __init__(self, options: ScoringOptions, log: Callable[[str], None]) -> None:
        """Check that ray is installed. No connection is made yet.

        Args:
            options: Options of `fledge score`.
            log: Function that is called with each line for the user.

        Raises:
            OptionError: The package ray is not installed.
        """
        ray_cluster.check_installed()
        self._options, self._log = options, log

    def __enter__(self) -> RayBackend:
        return self

    def __exit__(self, *_: object) -> None:
        ray_cluster.disconnect()

    def open(self, bundle: Path, *, device: str, precision: str, threads: int | None) -> Predictor:
        """Connect to the cluster, and return a placeholder predictor.

        The placeholder has the properties of the actors' predictors (labels, precision, provider),
        but can't run the model.

        Args:
            bundle: The bundle, whose files are sent to the actors.
            device: auto, cpu, cuda or tensorrt; auto uses GPUs if the cluster has any.
            precision: auto, fp32, int8 or fp16; auto uses the fastest one in the bundle for the
                device.
            threads: Ignored. An actor on a CPU has one thread.

        Raises:
            BundleError: The bundle is invalid. Errors that only show when the model is opened are
                raised by `run`.
            OptionError: An option has an invalid value.
            WorkError: No cluster can be reached at the address, or the cluster has no CPUs or no
                GPUs.
        """
        if device not in ("auto", *runtime.PROVIDERS):
            raise OptionError(f"device = {device!r}: use auto, {', '.join(runtime.PROVIDERS)}")
        self._bundle = storage.read(bundle)
        self._pool = ray_cluster.connect(device, self._options.workers)
        provider = runtime.PROVIDERS[self._pool.device]
        self._precision = choose(self._bundle, precision, provider)
        return Predictor(self._bundle.manifest, RemoteRuntime(provider), self._precision)

    def run(self, job: ScoringJob) -> None:
        """Score the incomplete shards of a job on the actors.

        Raises:
            FledgeError: An actor failed. The complete shards stay in the journal.
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
    """Joins the task results of each shard, and writes complete shards to the journal.

    The results may arrive in any order.
    """

    def __init__(self, journal: ScoringJournal, parts: Counter[int]) -> None:
        """Store the arguments.

        Args:
            journal: Journal of the job.
            parts: For each shard number, the number of tasks that the shard was divided into.
        """
        self._journal, self._parts = journal, parts
        self._received: dict[int, dict[int, tuple[list[ScoreRow], Features | None]]] = {}

    def add(self, result: Task) -> list[ScoreRow]:
        """Add the result of a task, and return its rows.

        If all results of the shard are now present, the shard is written to the journal.
        """
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
    """Divide the incomplete shards into tasks of whole batches.

    The image names are encoded as JSON, because Ray can't transfer strings that are not UTF-8.

    Args:
        journal: Journal of the job.
        batch: Number of images in a batch.
        workers: Number of actors.
    """
    left = journal.total - journal.done
    images = min(max(_TASK_IMAGES, left // (workers * _TASKS)), SIZE)
    size = max(1, images // batch) * batch
    for shard, names in journal.todo():
        for at in range(0, len(names), size):
            part = names[at : at + size]
            yield {"shard": shard, "part": at, "images": len(part), "names": json.dumps(part)}


def _bundle_files(bundle: storage.Bundle) -> dict[str, bytes]:
    """Return the contents of all files of a bundle, by path relative to the bundle's folder."""
    top = (storage.MANIFEST, storage.CHECKSUM, storage.SIGNATURE)
    files = {
        name: read_limited(bundle.folder / name, MAX_BYTES)
        for name in top
        if (bundle.folder / name).exists()
    }
    version = bundle.payload.name
    return files | {f"{version}/{name}": bundle.load(name) for name in bundle.manifest.files}
