"""Batch scoring: many images -> one table, one row for every input, in their order.

    inputs.find ─names─> journal ─shards─> threads: load, decode, views, graph ─rows─> journal
    ─all shards, in order─> table

A broken image is a row with the code that the service would answer. Batches are formed by the
order of the inputs alone, so the rows depend neither on the number of threads nor on where an
earlier run was killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.bundle.tuning import measured_parallelism
from serving.errors import OptionError
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from serving.inference.runtime import on_cpu
from serving.inputs import sources
from serving.scoring import copy_by_label
from serving.scoring import summary as summaries
from serving.scoring import table as tables
from serving.scoring import table_folder as parts
from serving.scoring.journal import ScoringJournal, begun
from serving.scoring.scorer import Chunk, Scorer, in_order
from serving.scoring.summary import Summary
from serving.scoring.table import COLUMNS, PROBABILITIES, Features, ScoreRow, TableFile
from serving.scoring.table_folder import TableFolder
from serving.scoring.writers import FEATURES
from serving.utils.cpu import cores
from serving.utils.files import check_folder
from serving.utils.progress import Progress


@dataclass(frozen=True)
class ScoringOptions:
    """How to score.

    tta: how many of the bundle's views are averaged; 0 and 1 mean the plain one.
    top_k: how many classes a row names; all where there are fewer.
    device: auto, cpu, cuda or tensorrt; precision: auto, fp32, int8 or fp16.
    workers: threads, each with a run of the graph of its own; None takes one for each core, and as
        many runs at a time as the bundle's tuning says.
    batch: rows (images times views) of one run of the graph; None takes the bundle's tuning.
    max_errors: "N" or "P%": with more broken images the run is finished and then fails.
    probabilities: a column with those of all classes.
    embeddings: a column with the graph's features; Parquet only.
    column: of a list of inputs in CSV or Parquet.
    addresses: what addresses in lists may begin with besides those of the inputs: "s3,https".
    copy_to: a folder that gets a copy of every image, in a folder for each label.
    restart: forget what a run that was not finished has done.
    engine: local, or ray: the work is done by a cluster, `workers` are its actors.
    """

    tta: int = 0
    top_k: int = 5
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    batch: int | None = None
    max_errors: str | None = None
    probabilities: bool = False
    embeddings: bool = False
    column: str | None = None
    addresses: str = ""
    copy_to: Path | None = None
    restart: bool = False
    engine: str = "local"

    def protocols(self, inputs: Sequence[str]) -> list[str]:
        """Those that addresses may have."""
        return sources.protocols(inputs, self.addresses)

    def scoring(self, batch: int, protocols: Sequence[str]) -> dict[str, Any]:
        """What a `Scorer` has to know, of any engine; `batch`: rows of one run of the graph."""
        return {
            "batch": max(1, batch // max(1, self.tta)),
            "tta": self.tta,
            "top_k": self.top_k,
            "probabilities": self.probabilities,
            "embeddings": self.embeddings,
            "protocols": protocols,
        }

    def check(self, inputs: Sequence[str], out: Path) -> None:
        """Find what is wrong before any work.

        Raises:
            OptionError: A value that can't be used.
        """
        for name, least in (("top_k", 1), ("workers", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"--{name.replace('_', '-')} {value}: use {least} or more")
        summaries.limit(self.max_errors)
        if self.engine == "ray" and parts.is_parts(out):
            parts.check(out)
        else:
            tables.check(out, features=self.embeddings)
        if self.copy_to is not None:
            check_folder(self.copy_to, "--copy-to")
            home = self.copy_to.resolve()
            for name in inputs:
                if Path(name).is_dir() and home.is_relative_to(Path(name).resolve()):
                    raise OptionError(f"--copy-to {self.copy_to} lies in {name}, which is scored")


def score(
    inputs: Sequence[str],
    bundle: Path,
    out: Path,
    options: ScoringOptions = ScoringOptions(),
    *,
    say: Callable[[str], None] = print,
) -> Summary:
    """Score every image of `inputs` and write the table `out`, with `OUT.summary.json` beside it.

    What was done stays done: killed at any time and called again with the same arguments, it goes
    on, and the table is that of a run that nobody stopped.

    Args:
        inputs: As `inputs.find`.
        bundle: The model.
        out: A `.csv`, `.jsonl` or `.parquet` file, or with ray a folder of Parquet files as `parts`
            has them; replaced when the new table is whole.
        options: As `Options`.
        say: Takes what is to be told to people.

    Raises:
        OptionError: An option that can't be used; another job lies unfinished at `out`.
        DataError: No inputs.
        BundleError: No usable bundle.
        WorkError: Not one image could be scored, or the table can't be written.
        GateError: More errors than `max_errors`; the table is complete.
    """
    if options.engine == "local":
        return _score(inputs, bundle, out, options, say, open_predictor, _work)
    if options.engine != "ray":
        raise OptionError(f"--engine {options.engine}: use local or ray")
    from serving.scoring.ray_backend import RayBackend

    with RayBackend(options, say) as team:
        return _score(inputs, bundle, out, options, say, team.open, team.work)


def _score(
    inputs: Sequence[str],
    bundle: Path,
    out: Path,
    options: ScoringOptions,
    say: Callable[[str], None],
    open_: Callable[..., Predictor],
    work: Callable[[ScoringJournal, Predictor, ScoringOptions, int, Progress, list[str]], None],
) -> Summary:
    options.check(inputs, out)
    skipped: list[str] = []
    names: Iterator[str] | None = None
    if "-" not in inputs and (options.restart or not begun(out)):
        # A wrong name is told at once, not behind the loading of a model.
        names = _found(inputs, options.column, say, skipped)
    threads = 1 if options.workers else None  # as tuned, where nothing else is said
    predictor = open_(bundle, device=options.device, precision=options.precision, threads=threads)
    predictor.check(options.tta)
    batch = options.batch or predictor.cap
    with ScoringJournal(
        out, _facts(inputs, predictor, options, batch), restart=options.restart
    ) as journal:
        if not journal.known:
            try:
                names = names or _found(inputs, options.column, say, skipped)
                journal.keep_inputs(names, skipped)
            except BaseException:
                journal.remove()  # nothing was done yet that one could go on with
                raise
        if journal.done:
            say(f"going on: {journal.done} of {journal.total} images are done")
        with Progress(journal.total, journal.done) as progress:
            work(journal, predictor, options, batch, progress, options.protocols(inputs))
            seconds, now = progress.seconds, progress.now
        labels, errors = _publish(journal, out, options)
        summary = Summary(
            journal.total,
            labels.total(),
            dict(errors.most_common()),
            dict(labels.most_common()),
            seconds,
            now,
            journal.skipped,
        )
        summary.write(out, predictor)
        if options.copy_to is not None:
            say(copy_by_label.copy(options.copy_to, _rows(journal), options.protocols(inputs)))
        journal.remove()
    say(f"{summary}\nwrote {out}")
    summary.judge(out, options.max_errors)
    return summary


def _found(
    inputs: Sequence[str], column: str | None, say: Callable[[str], None], skipped: list[str]
) -> Iterator[str]:
    """The names of the inputs; what could not be looked into is told and joins `skipped`."""

    def note(line: str) -> None:
        skipped.append(line)
        # A name that is not UTF-8 must not stop a terminal.
        say(f"skipped: {line}".encode("utf-8", "backslashreplace").decode())

    return sources.find(inputs, column=column, note=note)


def _facts(
    inputs: Sequence[str], predictor: Predictor, options: ScoringOptions, batch: int
) -> dict[str, object]:
    """All that decides rows, and a change of which must not meet rows of before."""
    kept = ("tta", "top_k", "probabilities", "embeddings", "column", "addresses")
    return {
        "bundle": predictor.model,
        "precision": predictor.precision,
        "provider": predictor.runtime.provider,
        "batch": batch,
        "inputs": list(inputs),
        **{name: getattr(options, name) for name in kept},
    }


def _work(
    journal: ScoringJournal,
    predictor: Predictor,
    options: ScoringOptions,
    batch: int,
    progress: Progress,
    protocols: list[str],
) -> None:
    """Do the shards that are to be done."""
    workers = options.workers or cores()
    tuned = measured_parallelism(predictor.manifest, predictor.precision, workers)
    scorer = Scorer(
        predictor,
        **options.scoring(batch, protocols),
        runs=None if options.workers or not on_cpu(predictor.runtime.provider) else tuned.runs,
    )
    rows: list[ScoreRow] = []
    features: list[Features] = []
    try:
        for done in in_order(scorer, _chunks(journal, scorer.chunk), workers):
            rows += done.rows
            features += [] if done.features is None else [done.features]
            for row in done.rows:
                progress.step(failed=row.status == "error")
            if done.chunk.last:
                journal.write(
                    done.chunk.shard, rows, np.concatenate(features) if features else None
                )
                rows, features = [], []
    finally:
        scorer.close()


def _chunks(journal: ScoringJournal, size: int) -> Iterator[Chunk]:
    for shard, names in journal.todo():
        for start in range(0, len(names), size):
            yield Chunk(shard, names[start : start + size], start + size >= len(names))


def _rows(journal: ScoringJournal) -> Iterator[ScoreRow]:
    for number in range(journal.shards):
        yield from journal.read(number)[0]


def _publish(
    journal: ScoringJournal, out: Path, options: ScoringOptions
) -> tuple[Counter[str], Counter[str]]:
    """Write the table from the shards; counts of labels and of errors."""
    columns = [*COLUMNS]
    columns += [PROBABILITIES] if options.probabilities else []
    columns += [FEATURES] if options.embeddings else []
    labels, errors = Counter[str](), Counter[str]()
    with TableFolder(out, columns) if parts.is_parts(out) else TableFile(out, columns) as table:
        for number in range(journal.shards):
            rows, features = journal.read(number)
            table.append(rows, features)
            labels.update(row.label for row in rows if row.label is not None)
            errors.update(row.error.partition(":")[0] for row in rows if row.label is None)
    return labels, errors
