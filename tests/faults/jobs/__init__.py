"""The jobs whose faults are swept. A module of jobs imports what its jobs need."""

import importlib
import os
from typing import Any, Final

JOBS: Final = {
    "score-csv": "scoring:ScoreCsv",
    "score-parquet": "scoring:ScoreParquet",
    "score-folder": "scoring:ScoreFolder",
    "score-restart": "scoring:ScoreRestart",
    "score-copy": "scoring:ScoreCopy",
    "evaluate-scores": "scoring:EvaluateScores",
    "sample": "data:Sample",
    "pixels": "data:Pixels",
    "pixels-evict": "data:PixelsEvict",
    "activations": "data:Activations",
    "report": "training:Report",
    "train": "training:Train",
    "resume": "training:Resume",
    "export": "export:Export",
    "export-first": "export:ExportFirst",
}
"""Name of each job -> its module and class."""


def create(name: str) -> Any:
    """Import a job's module, and return a new job.

    Numpy and torch get one thread each, because a process with threads must not fork.
    """
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    module, _, cls = JOBS[name].partition(":")
    return getattr(importlib.import_module(f"tests.faults.jobs.{module}"), cls)()
