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

import numpy as np

from serving import inputs as sources
from serving import sorting
from serving import summary as summaries
from serving import table as tables
from serving.cores import cores
from serving.errors import OptionError
from serving.files import check_folder
from serving.parquet import FEATURES
from serving.predictor import Predictor, open_predictor
from serving.progress import Progress
from serving.scorer import Chunk, Scorer, in_order
from serving.shards import Journal
from serving.summary import Summary
from serving.table import COLUMNS, PROBABILITIES, Features, Row, Table


@dataclass(frozen=True)
class Options:
    """How to score.

    tta: how many of the bundle's views are averaged; 0 and 1 mean the plain one.
    top_k: how many classes a row names; all where there are fewer.
    device: auto, cpu, cuda or tensorrt; precision: auto, fp32, int8 or fp16.
    workers: threads; None takes one for each core.
    batch: rows (images times views) of one run of the graph; None takes the bundle's tuning.
    max_errors: "N" or "P%": with more broken images the run is finished and then fails.
    probabilities: a column with those of all classes.
    embeddings: a column with the graph's features; Parquet only.
    column: of a list of inputs in CSV or Parquet.
    copy_to: a folder that gets a copy of every image, in a folder for each label.
    restart: forget what a run that was not finished has done.
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
    copy_to: Path | None = None
    restart: bool = False

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
    options: Options = Options(),
    *,
    say: Callable[[str], None] = print,
) -> Summary:
    """Score every image of `inputs` and write the table `out`, with `OUT.summary.json` beside it.

    What was done stays done: killed at any time and called again with the same arguments, it goes
    on, and the table is that of a run that nobody stopped.

    Args:
        inputs: As `inputs.find`.
        bundle: The model.
        out: A `.csv`, `.jsonl` or `.parquet` file; replaced when the new table is whole.
        options: As `Options`.
        say: Takes what is to be told to people.

    Raises:
        OptionError: An option that can't be used; another job lies unfinished at `out`.
        DataError: No inputs.
        BundleError: No usable bundle.
        WorkError: Not one image could be scored, or the table can't be written.
        GateError: More errors than `max_errors`; the table is complete.
    """
    options.check(inputs, out)
    if "-" not in inputs:  # a wrong name is told at once, not behind the loading of a model
        next(sources.find(inputs, column=options.column, note=lambda _: None), None)
    predictor = open_predictor(
        bundle, device=options.device, precision=options.precision, threads=1
    )
    predictor.check(options.tta)
    batch = options.batch or predictor.cap
    with Journal(
        out, _facts(inputs, predictor, options, batch), restart=options.restart
    ) as journal:
        if not journal.known:
            try:
                journal.keep_inputs(_found(inputs, options.column, say))
            except BaseException:
                journal.remove()  # nothing was done yet that one could go on with
                raise
        if journal.done:
            say(f"going on: {journal.done} of {journal.total} images are done")
        with Progress(journal.total, journal.done) as progress:
            _work(journal, predictor, options, batch, progress)
            seconds, now = progress.seconds, progress.now
        labels, errors = _publish(journal, out, options)
        summary = Summary(
            journal.total,
            labels.total(),
            dict(errors.most_common()),
            dict(labels.most_common()),
            seconds,
            now,
        )
        summary.write(out, predictor)
        if options.copy_to is not None:
            say(sorting.copy(options.copy_to, _rows(journal)))
        journal.remove()
    say(f"{summary}\nwrote {out}")
    summary.judge(out, options.max_errors)
    return summary


def _found(inputs: Sequence[str], column: str | None, say: Callable[[str], None]) -> Iterator[str]:
    """The names of the inputs; what could not be looked into is told."""

    def note(line: str) -> None:
        # A name that is not UTF-8 must not stop a terminal.
        say(f"skipped: {line}".encode("utf-8", "backslashreplace").decode())

    return sources.find(inputs, column=column, note=note)


def _facts(
    inputs: Sequence[str], predictor: Predictor, options: Options, batch: int
) -> dict[str, object]:
    """All that decides rows, and a change of which must not meet rows of before."""
    kept = ("tta", "top_k", "probabilities", "embeddings", "column")
    return {
        "bundle": predictor.model,
        "precision": predictor.precision,
        "provider": predictor.runtime.provider,
        "batch": batch,
        "inputs": list(inputs),
        **{name: getattr(options, name) for name in kept},
    }


def _work(
    journal: Journal, predictor: Predictor, options: Options, batch: int, progress: Progress
) -> None:
    """Do the shards that are to be done."""
    views = max(1, options.tta)
    scorer = Scorer(
        predictor,
        batch=max(1, batch // views),
        tta=options.tta,
        top_k=options.top_k,
        probabilities=options.probabilities,
        embeddings=options.embeddings,
    )
    rows: list[Row] = []
    features: list[Features] = []
    try:
        for done in in_order(scorer, _chunks(journal, scorer.chunk), options.workers or cores()):
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


def _chunks(journal: Journal, size: int) -> Iterator[Chunk]:
    for shard, names in journal.todo():
        for start in range(0, len(names), size):
            yield Chunk(shard, names[start : start + size], start + size >= len(names))


def _rows(journal: Journal) -> Iterator[Row]:
    for number in range(journal.shards):
        yield from journal.read(number)[0]


def _publish(journal: Journal, out: Path, options: Options) -> tuple[Counter[str], Counter[str]]:
    """Write the table from the shards; counts of labels and of errors."""
    columns = [*COLUMNS]
    columns += [PROBABILITIES] if options.probabilities else []
    columns += [FEATURES] if options.embeddings else []
    labels, errors = Counter[str](), Counter[str]()
    with Table(out, columns) as table:
        for number in range(journal.shards):
            rows, features = journal.read(number)
            table.append(rows, features)
            labels.update(row.label for row in rows if row.label is not None)
            errors.update(row.error.partition(":")[0] for row in rows if row.label is None)
    return labels, errors
