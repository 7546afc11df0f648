"""Batch scoring: many images -> one table, one row for every input, in their order.

    inputs.find --paths--> threads: load, decode, views, graph --rows in order--> table

A broken image is a row with the code that the service would answer. Each image is decoded and
inferred alone by one thread: nothing of it can reach a neighbour, and the answers do not depend
on how many threads there are.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serving import inputs as sources
from serving.errors import FledgeError, GateError, OptionError, WorkError
from serving.predictor import Predictor, open_predictor
from serving.progress import Progress
from serving.settings import cores
from serving.table import Row, Table

_AHEAD: Final = 8
"""Images a worker may be ahead of the table: hides a slow one, and bounds the memory."""


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    images: rows written; scored: those with an answer.
    errors: code -> count; labels: label -> count; both most frequent first.
    seconds: from the first image to the last, without loading the model.
    """

    images: int
    scored: int
    errors: Mapping[str, int]
    labels: Mapping[str, int]
    seconds: float

    def __str__(self) -> str:
        """A few lines for people."""
        rate = self.images / max(self.seconds, 1e-9)
        lines = [f"{self.images} images in {self.seconds:.1f} s, {rate:.0f} images/s"]
        lines.append(f"scored: {self.scored}{_counts(self.labels)}")
        if self.errors:
            lines.append(f"errors: {self.images - self.scored}{_counts(self.errors)}")
        return "\n".join(lines)


def score(
    inputs: Path,
    bundle: Path,
    out: Path,
    *,
    tta: int = 0,
    top_k: int = 5,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    max_errors: str | None = None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Score every image of `inputs` and write the table `out`.

    Args:
        inputs: A folder, an image, or a `.txt` list of paths.
        bundle: The model.
        out: A `.csv` or `.jsonl` file; replaced when the new table is whole, and only then.
        tta: How many of the bundle's views are averaged; 0 and 1 mean the plain one.
        top_k: How many classes a row names; all where there are fewer.
        device: auto, cpu, cuda or tensorrt.
        precision: auto, fp32, int8 or fp16.
        workers: Threads; None takes one for each core.
        max_errors: "N" or "P%": with more broken images the run is finished and then fails.
        say: Takes what is to be told to people.

    Raises:
        OptionError: An option that can't be used, found before any work.
        DataError: No inputs.
        BundleError: No usable bundle.
        WorkError: Not one image could be scored, or the table can't be written.
        GateError: More errors than `max_errors`; the table is complete.
    """
    if top_k < 1:
        raise OptionError(f"--top-k {top_k}: use 1 or more")
    if workers is not None and workers < 1:
        raise OptionError(f"--workers {workers}: use 1 or more")
    allowed = _limit(max_errors)
    with Table(out) as table:
        found = sources.find(inputs)
        for line in found.unreadable:
            # A name that is not UTF-8 must not stop a terminal.
            line = line.encode("utf-8", "backslashreplace").decode()
            say(f"skipped a folder that can't be read: {line}")
        # One thread a session: workers run side by side, and their number decides no answer.
        predictor = open_predictor(bundle, device=device, precision=precision, threads=1)
        predictor.check(tta)
        work = _scorer(predictor, tta, min(top_k, len(predictor.manifest.labels)))
        errors, labels = Counter[str](), Counter[str]()
        with Progress(len(found.paths)) as progress:
            for row in _in_order(work, found.paths, workers or cores()):
                table.append(row)
                progress.step(failed=row.status == "error")
                if row.label is None:
                    errors[row.error.partition(":")[0]] += 1
                else:
                    labels[row.label] += 1
            seconds = progress.seconds
    scored, images = labels.total(), len(found.paths)
    summary = Summary(
        images, scored, dict(errors.most_common()), dict(labels.most_common()), seconds
    )
    say(f"{summary}\nwrote {out}")
    if not scored:
        raise WorkError(
            f"not one of {images} images could be scored; see the column error of {out}"
        )
    if allowed is not None and errors.total() > allowed(images):
        raise GateError(
            f"{errors.total()} of {images} images could not be scored, more than "
            f"--max-errors {max_errors}; see the column error of {out}"
        )
    return summary


def _scorer(predictor: Predictor, tta: int, top_k: int) -> Callable[[str], Row]:
    def work(path: str) -> Row:
        try:
            prepared = predictor.prepare(sources.load(path), tta)
            prediction = predictor.predict([prepared])[0]
        except FledgeError as error:
            return Row.of_error(path, error)
        return Row.of_answer(path, predictor.answer(prediction, top_k))

    return work


def _in_order(work: Callable[[str], Row], paths: Iterable[str], workers: int) -> Iterator[Row]:
    """Map `work` over `paths` by threads; rows come in the order of the paths."""
    pending: deque[Future[Row]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="score")
    try:
        for path in paths:
            pending.append(pool.submit(work, path))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # On Ctrl-C what runs is waited for, what waits is dropped.
        pool.shutdown(wait=True, cancel_futures=True)


def _limit(max_errors: str | None) -> Callable[[int], float] | None:
    """How many errors are allowed among so many images."""
    if max_errors is None:
        return None
    match = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)%", max_errors.strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise OptionError(f"--max-errors {max_errors}: use a number, or a percentage such as 5%")
    if match[1]:
        number = int(match[1])
        return lambda images: number
    share = float(match[2])
    return lambda images: images * share / 100


def _counts(counts: Mapping[str, int], most: int = 10) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:most]]
    if len(counts) > most:
        shown.append(f"and {len(counts) - most} more")
    return f" ({', '.join(shown)})" if shown else ""
