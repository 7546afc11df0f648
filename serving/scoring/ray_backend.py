"""Batch scoring on Ray Data: the same job on as many machines as a cluster has.

    journal ─tasks─> Ray Data: actors, a model each: load, decode, views, graph ─rows─> journal

What is found, kept and written is on the machine of the command, as in `score`; a task is a part
of a shard, whole batches of it, so the rows are those of one machine. Ray starts an actor that
died with its machine anew on another and gives it what it had not finished.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from serving import errors
from serving.bundle import storage as bundles
from serving.errors import FledgeError, OptionError, WorkError
from serving.inference import runtime
from serving.inference.load import choose, open_predictor
from serving.inference.predictor import Predictor
from serving.inputs.remote import is_address
from serving.inputs.tar import split
from serving.scoring import ray_cluster
from serving.scoring.journal import SIZE, Features, ScoringJournal
from serving.scoring.scorer import Chunk, ScoredChunk, Scorer, in_order
from serving.scoring.table import ScoreRow

if TYPE_CHECKING:
    from serving.scoring.score import ScoringOptions
    from serving.utils.progress import Progress

_WAITING: Final = 8
"""Threads for one that computes, where images come from addresses: most of the time they wait."""
_TASKS: Final = 16
"""Tasks that an actor gets at least, where there are images enough: so all end together."""
_LEAST: Final = 32
"""Images of a task, unless there are fewer: handing one over takes some milliseconds."""

Task = dict[str, Any]
"""What Ray carries: shard and part; on the way there names, on the way back rows or a fault."""


class RemoteRuntime:
    """The runtime of a predictor whose graph is in the actors; a `runtime.Runtime`."""

    def __init__(self, provider: str) -> None:
        """`provider`: what the actors must have."""
        self.provider = provider

    def run(self, pixels: Any) -> Any:
        """Not here."""
        raise WorkError("the graph runs in the actors")


@dataclass(frozen=True)
class RayJob:
    """What an actor needs to know.

    bundle: how it is called where the command runs; files: what is in it, for `cluster.shared`.
    here: the folder that relative paths start from.
    sample: an input that is there where the command runs, and so must be where an actor runs; ""
        for none.
    threads: of an actor; scoring: as `Scorer`.
    """

    bundle: str
    files: Any
    device: str
    precision: str
    threads: int
    here: str
    sample: str
    scoring: dict[str, Any]


class RayWorker:
    """What an actor is: the model, loaded once, and a task at a time."""

    def __init__(self, job: RayJob) -> None:
        """Open the model. What is wrong is said by every task: Ray would hide it."""
        self._job, self._fault = job, ""
        try:
            self._scorer = Scorer(_opened(job), **job.scoring)
        except FledgeError as error:
            self._fault = f"{type(error).__name__}:{error} (on {socket.gethostname()})"

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Score a task: rows as lines of JSON, features as bytes."""
        rows: list[ScoreRow] = []
        features: list[Any] = []
        if not self._fault:
            for done in self._done(json.loads(task["names"])):
                rows += done.rows
                features += [] if done.features is None else [done.features]
        return {
            "shard": task["shard"],
            "part": task["part"],
            "fault": self._fault,
            "rows": "".join(row.to_json() for row in rows),
            "features": np.concatenate(features).tobytes() if features else b"",
        }

    def _done(self, names: list[str]) -> Iterator[ScoredChunk]:
        size = self._scorer.chunk
        chunks = (Chunk(0, names[at : at + size], False) for at in range(0, len(names), size))
        threads = self._job.threads * (_WAITING if any(map(is_address, names)) else 1)
        if threads == 1:
            return map(self._scorer, chunks)
        return in_order(self._scorer, chunks, threads)


def _opened(job: RayJob) -> Predictor:
    """The predictor of an actor, from files that came with the job."""
    if os.path.isdir(job.here):
        os.chdir(job.here)
    if job.sample and not os.path.exists(job.sample):
        raise OptionError(
            f"{job.sample} is not there: every machine of the cluster must see the images under "
            "the same path; share the folder, or give addresses such as s3://"
        )
    with tempfile.TemporaryDirectory(prefix="fledge-") as folder:
        for name, data in ray_cluster.shared(job.files).items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            return open_predictor(Path(folder), device=job.device, precision=job.precision)
        except FledgeError as error:
            raise type(error)(str(error).replace(folder, job.bundle)) from error


class RayBackend:
    """Actors on a cluster: that of RAY_ADDRESS, else one of this machine alone, for this job."""

    def __init__(self, options: ScoringOptions, say: Callable[[str], None]) -> None:
        """Nothing is started yet.

        Raises:
            OptionError: ray is not installed.
        """
        ray_cluster.check()
        self._options, self._say = options, say

    def __enter__(self) -> RayBackend:
        """Nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what was started, actors in the middle of a task included."""
        ray_cluster.leave()

    def open(self, bundle: Path, *, device: str, precision: str, threads: int | None) -> Predictor:
        """Join the cluster. The predictor is that of the actors, told without opening it here.

        Args:
            bundle: Its files go to the actors.
            device: auto takes GPUs where the cluster has any; actors that can't use theirs fail.
            precision: As `open_predictor`.
            threads: No matter: an actor on a CPU has one core.

        Raises:
            BundleError, OptionError: What can be known here; actors find the rest.
            WorkError: There is no such cluster, or nothing in it to work on.
        """
        if device not in ("auto", *runtime.PROVIDERS):
            raise OptionError(f"device = {device!r}: use auto, {', '.join(runtime.PROVIDERS)}")
        self._bundle = bundles.read(bundle)
        self._pool = ray_cluster.join(device, self._options.workers)
        self._precision = choose(self._bundle, precision, runtime.PROVIDERS[self._pool.device])
        there = RemoteRuntime(runtime.PROVIDERS[self._pool.device])
        return Predictor(self._bundle.manifest, there, self._precision)

    def work(
        self,
        journal: ScoringJournal,
        predictor: Predictor,
        options: ScoringOptions,
        batch: int,
        progress: Progress,
        protocols: list[str],
    ) -> None:
        """Do the shards that are to be done.

        Raises:
            FledgeError: What an actor could not do its work for; nothing is lost that was done.
        """
        scoring = options.scoring(batch, protocols)
        tasks = list(_tasks(journal, scoring["batch"], self._pool.workers))
        if not tasks:
            return
        job = self._job(tasks[0], scoring)
        shards = _Shards(journal, Counter(task["shard"] for task in tasks))
        try:
            with closing(self._pool.map(RayWorker, job, tasks, self._say)) as results:
                for done in results:
                    if done["fault"]:
                        kind, _, message = done["fault"].partition(":")
                        raise vars(errors)[kind](message)
                    for row in shards.add(done):
                        progress.step(failed=row.status == "error")
        except OptionError:
            if not journal.done:
                journal.remove()  # the next command asks for other things
            raise

    def _job(self, task: Task, scoring: dict[str, Any]) -> RayJob:
        names = [name for name in json.loads(task["names"]) if not is_address(name)]
        places = (split(name) or (name, "") for name in names)
        sample = next((path for path, _ in places if os.path.exists(path)), "")
        return RayJob(
            str(self._bundle.folder),
            ray_cluster.share(_files(self._bundle)),
            self._pool.device,
            self._precision,
            self._pool.threads,
            os.getcwd(),
            sample and os.path.abspath(sample),
            scoring,
        )


class _Shards:
    """Puts shards together from the parts that come in any order."""

    def __init__(self, journal: ScoringJournal, parts: Counter[int]) -> None:
        """`parts`: how many each shard has."""
        self._journal, self._missing = journal, parts
        self._found: dict[int, dict[int, tuple[list[ScoreRow], Features | None]]] = {}

    def add(self, done: Task) -> list[ScoreRow]:
        """Take a part, and write the shard down if it was the last; the part's rows."""
        rows = [ScoreRow.from_json(line) for line in done["rows"].splitlines()]
        vectors = np.frombuffer(done["features"], np.float32).reshape(len(rows), -1)
        shard, part = done["shard"], done["part"]
        found = self._found.setdefault(shard, {})
        found[part] = rows, vectors if done["features"] else None
        if len(found) == self._missing[shard]:
            self._write(shard, [self._found[shard][part] for part in sorted(found)])
            del self._found[shard]
        return rows

    def _write(self, shard: int, parts: list[tuple[list[ScoreRow], Features | None]]) -> None:
        rows = [row for part, _ in parts for row in part]
        vectors = [part for _, part in parts if part is not None]
        self._journal.write(shard, rows, np.concatenate(vectors) if vectors else None)


def _tasks(journal: ScoringJournal, batch: int, workers: int) -> Iterator[Task]:
    """Parts of shards, whole batches of them; names as JSON, which bears what is not UTF-8."""
    left = journal.total - journal.done
    images = min(max(_LEAST, left // (workers * _TASKS)), SIZE)
    size = max(1, images // batch) * batch
    for shard, names in journal.todo():
        for at in range(0, len(names), size):
            part = names[at : at + size]
            yield {"shard": shard, "part": at, "images": len(part), "names": json.dumps(part)}


def _files(bundle: bundles.Bundle) -> dict[str, bytes]:
    """All that a bundle is, by names in its folder."""
    top = (bundles.MANIFEST, bundles.CHECKSUM, bundles.SIGNATURE)
    files = {
        name: (bundle.folder / name).read_bytes() for name in top if (bundle.folder / name).exists()
    }
    version = bundle.payload.name
    return files | {f"{version}/{name}": bundle.load(name) for name in bundle.manifest.files}
