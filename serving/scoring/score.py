"""Score many images and write one table, with a row for each image in the order of the inputs.

    1. The inputs are searched for images, whose names are written to the journal of the job.
    2. Threads load, decode and score the images. Rows are written to the journal in shards of 1,000
       images.
    3. When all shards are complete, the table is written from the journal.

An image that can't be scored becomes a row with the error code that the HTTP service returns.
Batches depend only on the order of the images. The rows therefore depend neither on the number of
threads nor on interruptions of the run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.bundle.manifest import measured_parallelism
from serving.errors import OptionError, WorkError
from serving.imaging.limits import max_pixels_of_commands
from serving.inference import isolated_load
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from serving.inference.runtime import on_cpu
from serving.inputs import sources
from serving.inputs.passed_over import PassedOver
from serving.scoring.copy_by_label import check_copies, copy_by_label
from serving.scoring.job import ScoringJob
from serving.scoring.journal import ScoringJournal, has_inputs
from serving.scoring.options import ScoringOptions
from serving.scoring.rows import COLUMNS, FEATURES, PROBABILITIES, Features, ScoreRow
from serving.scoring.scorer import Chunk, Scorer, score_chunks
from serving.scoring.summary import Summary
from serving.scoring.table import TableFile
from serving.scoring.table_folder import TableFolder, is_table_folder
from serving.settings import load_timeout
from serving.terminal import escape, show_lines
from serving.utils.cpu import cores
from serving.utils.progress import Progress


def score(
    inputs: Sequence[str],
    bundle: Path,
    out: Path,
    options: ScoringOptions | None = None,
    *,
    log: Callable[[str], None] = show_lines,
) -> Summary:
    """Score every image of `inputs`, and write the table `out` and a summary file beside it.

    A run that was interrupted at any time resumes when `score` is called again with the same
    arguments. The resulting table is the same as that of an uninterrupted run.

    Args:
        inputs: Folders, images, lists, tar archives, patterns and addresses, as for `sources.find`.
        bundle: Folder of the bundle.
        out: A `.csv`, `.jsonl` or `.parquet` file. With the engine "ray", also a folder, in which
            Parquet files are written. An existing table is replaced when the new one is complete.
        options: Further options; None: the defaults.
        log: Function that is called with each line for the user.

    Raises:
        OptionError: An option has an invalid value, or `out` has an unfinished job with other
            options.
        DataError: An input can't be used, or there are no images.
        BundleError: The bundle is invalid.
        WorkError: No image could be scored, or the table can't be written.
        GateError: More images than `options.max_errors` allows could not be scored. The table is
            complete.
    """
    options = options or ScoringOptions()
    if options.engine == "local":
        return _score(inputs, bundle, out, options, log, _open_locally, _run_locally)
    if options.engine != "ray":
        raise OptionError(f"--engine {options.engine}: use local or ray")
    from serving.scoring.ray_backend import RayBackend  # ray is an optional package

    with RayBackend(options, log) as backend:
        return _score(inputs, bundle, out, options, log, backend.open, backend.run)


def _open_locally(bundle: Path, *, device: str, **options: Any) -> Predictor:
    with isolated_load.limits(bundle, device, load_timeout()) as before_load:
        return open_predictor(bundle, device=device, before_load=before_load, **options)


def _score(
    inputs: Sequence[str],
    bundle: Path,
    out: Path,
    options: ScoringOptions,
    log: Callable[[str], None],
    open_model: Callable[..., Predictor],
    run: Callable[[ScoringJob], None],
) -> Summary:
    options.check(inputs, out)
    options = replace(options, max_pixels=options.max_pixels or max_pixels_of_commands())
    skipped: list[str] = []
    passed_over = PassedOver()
    names: Iterator[str] | None = None
    if "-" not in inputs and (options.restart or not has_inputs(out)):
        # Find the inputs before the model is loaded, so that a wrong name is reported at once.
        names = _find(inputs, options.column, log, skipped, passed_over)
    # One thread per run if `workers` is given, else the number measured at export.
    threads = 1 if options.workers else None
    predictor = open_model(
        bundle, device=options.device, precision=options.precision, threads=threads
    )
    predictor.check(options.tta)
    if options.copy_to is not None:
        check_copies(options.copy_to, predictor.manifest.labels)
    batch = options.batch or predictor.cap
    facts = _facts(inputs, predictor, options, batch)
    with ScoringJournal(out, facts, restart=options.restart) as journal:
        if not journal.known:
            try:
                names = names or _find(inputs, options.column, log, skipped, passed_over)
                journal.write_inputs(names, skipped, passed_over)
            except BaseException:
                journal.remove()  # no image is scored yet, so there is nothing to resume
                raise
        if journal.damaged:
            log(f"damaged: {journal.damaged} parts of the unfinished job; they are scored again")
        if journal.done:
            log(f"going on: {journal.done} of {journal.total} images are done")
        with Progress(journal.total, journal.done) as progress:
            protocols = options.protocols(inputs)
            run(ScoringJob(journal, predictor, options, batch, protocols, progress))
            seconds, now = progress.seconds, progress.now
        labels, errors = _write_table(journal, out, options)
        summary = Summary(
            journal.total,
            labels.total(),
            dict(errors.most_common()),
            dict(labels.most_common()),
            seconds,
            now,
            journal.skipped,
            journal.passed_over,
        )
        summary.write(out, predictor, csv_safe=options.csv_safe)
        if options.copy_to is not None:
            rows, model = _all_rows(journal), predictor.manifest.labels
            log(copy_by_label(options.copy_to, rows, protocols, labels=model, root=options.root))
        journal.remove()
    log(f"{summary}\nwrote {out}")
    summary.check(out, options.max_errors)
    return summary


def _find(
    inputs: Sequence[str],
    column: str | None,
    log: Callable[[str], None],
    skipped: list[str],
    passed_over: PassedOver,
) -> Iterator[str]:
    """Return the names of the images in `inputs`.

    A message about each input that can't be read is logged and appended to `skipped`. What is
    passed over is counted in `passed_over`.
    """

    def note(line: str) -> None:
        skipped.append(line)
        log(escape(f"skipped: {line}"))

    return sources.find(inputs, column=column, note=note, passed_over=passed_over)


def _facts(
    inputs: Sequence[str], predictor: Predictor, options: ScoringOptions, batch: int
) -> dict[str, object]:
    """Return the values that determine the rows.

    An unfinished job is only resumed if it has the same values.
    """
    names = ("tta", "top_k", "probabilities", "embeddings", "column", "addresses", "max_pixels")
    return {
        "bundle": predictor.model,
        "precision": predictor.precision,
        "provider": predictor.runtime.provider,
        "batch": batch,
        "inputs": list(inputs),
        "root": None if options.root is None else os.path.realpath(options.root),
        **{name: getattr(options, name) for name in names},
    }


def _run_locally(job: ScoringJob) -> None:
    """Score the incomplete shards of a job in threads of this process."""
    workers = job.options.workers or cores()
    predictor = job.predictor
    tuned = measured_parallelism(predictor.manifest, predictor.precision, workers)
    limited = job.options.workers is None and on_cpu(predictor.runtime.provider)
    scorer = Scorer(
        predictor,
        job.options,
        batch=job.batch,
        protocols=job.protocols,
        runs=tuned.runs if limited else None,
    )
    rows: list[ScoreRow] = []
    features: list[Features] = []
    chunks = _chunks(job.journal, scorer.chunk_size)
    with closing(scorer), closing(score_chunks(scorer, chunks, workers)) as results:
        for scored in results:
            rows += scored.rows
            features += [] if scored.features is None else [scored.features]
            for row in scored.rows:
                job.progress.step(failed=row.status == "error")
            if scored.chunk.last:
                job.journal.write(
                    scored.chunk.shard, rows, np.concatenate(features) if features else None
                )
                rows, features = [], []


def _chunks(journal: ScoringJournal, size: int) -> Iterator[Chunk]:
    for shard, names in journal.todo():
        for start in range(0, len(names), size):
            yield Chunk(shard, names[start : start + size], start + size >= len(names))


def _all_rows(journal: ScoringJournal) -> Iterator[ScoreRow]:
    for number in range(journal.shards):
        yield from journal.read(number)[0]


def _write_table(
    journal: ScoringJournal, out: Path, options: ScoringOptions
) -> tuple[Counter[str], Counter[str]]:
    """Write the table from the shards in the journal.

    Returns:
        The number of rows by predicted label, and the number of rows by error code.
    """
    columns = [*COLUMNS]
    columns += [PROBABILITIES] if options.probabilities else []
    columns += [FEATURES] if options.embeddings else []
    labels, errors = Counter[str](), Counter[str]()
    with (
        TableFolder(out, columns)
        if is_table_folder(out)
        else TableFile(out, columns, csv_safe=options.csv_safe, csv_bom=options.csv_bom)
    ) as table:
        for number in range(journal.shards):
            rows, features = journal.read(number)
            table.append(rows, features)
            labels.update(row.label for row in rows if row.label is not None)
            errors.update(row.error.partition(":")[0] for row in rows if row.label is None)
        if labels.total() + errors.total() != journal.total:
            raise WorkError(f"--out {out}: there are not as many rows as images; add --restart")
    return labels, errors
