"""Jobs that score photos, or read a table of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy  # noqa: F401
import onnxruntime  # noqa: F401
import pyarrow.parquet as pq

from serving.errors import FledgeError
from serving.evaluation import evaluate_scores, table_reader  # noqa: F401
from serving.inference.load import open_predictor
from serving.scoring import copy_by_label, journal, score, table_folder  # noqa: F401
from serving.scoring.options import ScoringOptions
from tests.faults.jobs.base import CommandJob
from tests.support.tiny_bundle import photo, tiny_bundle

# Three photos are two shards.
journal.SIZE = 2  # type: ignore[misc]


class ScoreCsv(CommandJob):
    """Three photos into a CSV that replaces one of another bundle."""

    out = "scores.csv"
    options: tuple[str, ...] = ()

    def prepare(self) -> None:
        tiny_bundle(self.inputs / "bundle")
        tiny_bundle(self.inputs / "older", seed=1)
        (self.inputs / "photos").mkdir()
        for number in range(3):
            (self.inputs / "photos" / f"{number}.jpg").write_bytes(photo(number))
        self.score("older")

    def score(self, bundle: str = "bundle", *options: str) -> None:
        import fledge

        if fledge.main([*self.command()[:2], "--bundle", str(self.inputs / bundle),
                        *self.command()[4:], *options]):  # fmt: skip
            raise RuntimeError("score failed")

    def command(self) -> list[str]:
        return [
            "score", str(self.inputs / "photos"), "--bundle", str(self.inputs / "bundle"),
            "--out", str(self.work / self.out), "--workers", "1", "--device", "cpu", *self.options,
        ]  # fmt: skip

    def result(self) -> dict[str, Any]:
        return {"table": self.table(), "summary": self.summary()}

    def table(self) -> Any:
        found = self.read(self.out)[self.out]
        if found is not None:
            assert found.count(b"\n") == 4, found
        return found

    def summary(self) -> Any:
        path = (self.work / self.out).with_suffix(".summary.json")
        if not path.exists():
            return None
        values = json.loads(path.read_text())
        return {key: values[key] for key in values if key not in ("seconds", "now")}


class ScoreRestart(ScoreCsv):
    """An unfinished job of another bundle is discarded."""

    options = ("--restart",)

    def prepare(self) -> None:
        super().prepare()
        real = journal.ScoringJournal.remove
        journal.ScoringJournal.remove = lambda self: None  # type: ignore[method-assign]
        self.score("older")
        journal.ScoringJournal.remove = real  # type: ignore[method-assign]
        assert (self.work / ".scores.csv.parts" / "job.json").exists()


class ScoreParquet(ScoreCsv):
    """Parquet with embeddings, whose shards have a file of features each."""

    out = "scores.parquet"
    options = ("--embeddings", "--probabilities")

    def table(self) -> Any:
        path = self.work / self.out
        return _rows(path) if path.exists() else None


def _rows(path: Path) -> list[Any]:
    return pq.ParquetFile(path).read(use_threads=False).to_pylist()


class ScoreFolder(ScoreCsv):
    """A folder of Parquet files, as of `--engine ray`, scored in this process."""

    out = "scores"

    def score(self, bundle: str = "bundle", *options: str) -> None:
        if self._score(bundle):
            raise RuntimeError("score failed")

    def run(self) -> int:
        return self._score("bundle")

    def _score(self, bundle: str) -> int:
        import sys

        table_folder.ROWS = 2  # type: ignore[misc]
        options = ScoringOptions(engine="ray", workers=1, device="cpu")
        try:
            score._score(
                [str(self.inputs / "photos")], self.inputs / bundle, self.work / self.out, options,
                print, open_predictor, score._run_locally,
            )  # fmt: skip
        except FledgeError as error:  # as fledge.main
            print(f"fledge: {error}", file=sys.stderr)
            return error.exit_status
        except OSError as error:
            print(f"fledge: {error.filename}: {error.strerror}", file=sys.stderr)
            return 1
        return 0

    def table(self) -> Any:
        folder = self.work / self.out
        if not folder.exists():
            return None
        rows = [row for path in table_folder.part_files(folder) for row in _rows(path)]
        assert len(rows) == 3, rows
        return rows


class ScoreCopy(ScoreCsv):
    """A CSV and copies of the photos, of which one has the name of another."""

    @property
    def options(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("--copy-to", str(self.work / "copies"))

    def prepare(self) -> None:
        super().prepare()
        # The same label, and the same name.
        (self.inputs / "photos" / "more").mkdir()
        (self.inputs / "photos" / "2.jpg").rename(self.inputs / "photos" / "more" / "0.jpg")
        (self.inputs / "photos" / "more" / "0.jpg").write_bytes(photo(0))

    def result(self) -> dict[str, Any]:
        copies = self.work / "copies"
        files = [path for path in copies.rglob("*") if path.is_file() and path.suffix == ".jpg"]
        return super().result() | {
            path.relative_to(copies).as_posix(): path.read_bytes() for path in files
        }


class EvaluateScores(CommandJob):
    """Figures of a table, written as JSON, as a confusion matrix and as a list of mistakes."""

    def prepare(self) -> None:
        rows = ["a/1.jpg,ok,a,0.9", "a/2.jpg,ok,b,0.8", "b/3.jpg,ok,b,0.7"]
        for name, count in (("old", 2), ("new", 3)):
            text = "\n".join(["path,status,label,probability", *rows[:count], ""])
            (self.inputs / f"{name}.csv").write_text(text)
        import fledge

        assert fledge.main(["evaluate-scores", str(self.inputs / "old.csv"), *self._outputs()]) == 0

    def _outputs(self) -> list[str]:
        files = {
            "--json": "figures.json",
            "--confusion": "confusion.csv",
            "--mistakes": "wrong.csv",
        }
        pairs = [(option, str(self.work / name)) for option, name in files.items()]
        return ["--labels-from-folders", *(word for pair in pairs for word in pair)]

    def command(self) -> list[str]:
        return ["evaluate-scores", str(self.inputs / "new.csv"), *self._outputs()]

    def result(self) -> dict[str, Any]:
        return self.read("figures.json", "confusion.csv", "wrong.csv")
