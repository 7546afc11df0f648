"""Write and read the metric files of a run.

These files are metrics.csv (one row per epoch), steps.csv (one row per optimizer step) and
TensorBoard event files.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from serving.errors import DataError, WorkError
from serving.utils.files import atomic_write
from training.run.history import Epoch, Step

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event

METRICS: Final = "metrics.csv"
STEPS: Final = "steps.csv"
EVENTS: Final = "events"


class MetricLog:
    """Writer of metrics.csv, steps.csv and a TensorBoard event file.

    The writer is a context manager: the end of the context closes the event file.
    """

    def __init__(self, folder: Path, history: Sequence[Epoch]) -> None:
        """Start the files of a new run, or continue those of a resumed run.

        The CSV files keep only the rows of the epochs in `history`. Rows of an epoch that the run
        had not finished when it was killed are removed. A new event file is started.

        Args:
            folder: The run folder.
            history: The finished epochs.

        Raises:
            DataError: A file of the run can't be read.
            WorkError: A file can't be written.
        """
        self.folder = folder
        with self._work_errors():
            self._start(history)

    def _start(self, history: Sequence[Epoch]) -> None:
        folder = self.folder
        finished = {(row.stage, str(row.epoch)) for row in history}
        steps = [row for row in _read_rows(folder / STEPS) if (row[0], row[1]) in finished]
        _write(folder / METRICS, Epoch, [astuple(row) for row in history])
        _write(folder / STEPS, Step, steps)
        self.steps = len(steps)
        self._events = _EventFile(folder / EVENTS, self.steps)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._work_errors() if error is None else suppress(OSError):
            self._events.close()

    @contextmanager
    def _work_errors(self) -> Iterator[None]:
        """Convert an OSError in the block, which may name no file, to a WorkError."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise WorkError(f"the metrics in {self.folder} can't be written: {reason}") from error

    def add(self, epoch: Epoch, steps: Sequence[Step]) -> None:
        """Append a finished epoch and its optimizer steps to all files.

        Raises:
            WorkError: A file can't be written.
        """
        with self._work_errors():
            self._add(epoch, steps)

    def _add(self, epoch: Epoch, steps: Sequence[Step]) -> None:
        with (self.folder / STEPS).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                (*astuple(step)[:-1], " ".join(repr(rate) for rate in step.lr)) for step in steps
            )
        with (self.folder / METRICS).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(astuple(epoch))
        for step in steps:
            self._events.add(self.steps, _step_scalars(step))
            self.steps += 1
        # Step number of the epoch's last step, because readers drop events at the first step of a
        # resumed run.
        self._events.add(self.steps - 1, _epoch_scalars(epoch))
        self._events.flush()


class _EventFile:
    """Writer of a TensorBoard event file.

    tensorboardX's `SummaryWriter` is not used because it writes in a thread of its own and replaces
    the spaces in tags.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Start an event file.

        Args:
            folder: Folder of the event files; it is created if it does not exist.
            first_step: Number of the next optimizer step of the run, from 0. In a resumed run,
                TensorBoard drops the events of earlier files from this step on, because these steps
                are run again.
        """
        # Imported here, because only runs need the writer, and `read_steps` is used without it.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        # Readers sort files by name: time, then number.
        number = len(list(folder.glob("events.out.tfevents.*")))
        name = f"events.out.tfevents.{int(time.time()):010d}.{number:06d}.fledge"
        # Absolute, because tensorboardX takes a path that begins with "s3:" for an address.
        self._records = RecordWriter(str((folder / name).absolute()))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of one step; `scalars` maps each tag to its value."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _step_scalars(step: Step) -> dict[str, float]:
    *deeper, head = step.lr
    by_group = {f"lr/group {number}": rate for number, rate in enumerate(deeper, 1)}
    return {"loss/batch": step.loss, **by_group, "lr/head": head, "momentum": step.momentum}


def _epoch_scalars(epoch: Epoch) -> dict[str, float]:
    return {
        "loss/train": epoch.train_loss,
        "loss/valid": epoch.valid_loss,
        "accuracy/valid": epoch.accuracy,
        "seconds": epoch.seconds,
    }


def read_steps(folder: Path) -> list[Step]:
    """Read the optimizer steps of a run from steps.csv; an empty list if there is no such file.

    Raises:
        DataError: The file can't be read, or has other columns or values.
    """
    path = folder / STEPS
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Step(
                    row["stage"],
                    int(row["epoch"]),
                    int(row["step"]),
                    float(row["loss"]),
                    float(row["momentum"]),
                    tuple(map(float, row["lr"].split())),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        # AttributeError, TypeError: a row has fewer fields than the first line names.
        raise DataError(f"{path} can't be read: {error}") from error


def _read_rows(path: Path) -> list[list[str]]:
    """Read the rows of steps.csv, including the header.

    An incomplete row is dropped. If the process was killed during a write, the last row can be
    incomplete.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if len(row) == len(fields(Step))]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _write(path: Path, kind: type, rows: Iterable[Sequence[Any]]) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([field.name for field in fields(kind)])
        out.writerows(rows)
