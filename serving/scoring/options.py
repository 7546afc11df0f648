"""Options of batch scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.errors import OptionError
from serving.inputs import sources
from serving.scoring.summary import parse_error_limit
from serving.scoring.table import check_table
from serving.scoring.table_folder import check_table_folder, is_table_folder
from serving.utils.files import check_folder


@dataclass(frozen=True)
class ScoringOptions:
    """How to score; the names are those of the command line's options.

    Attributes:
        tta: Number of the bundle's views (crops or flips of a photo) to average; 0 and 1 both mean
            the plain view only.
        top_k: Number of classes in a row; all classes if there are fewer.
        device: auto, cpu, cuda or tensorrt.
        precision: auto, fp32, int8 or fp16.
        workers: Number of threads, each with its own run of the graph. None: one for each core, and
            as many concurrent runs as the bundle's tuning has.
            With `engine` ray: number of actors; None: one for each core, or for each GPU.
        batch: Rows (images times views) of one run of the graph; None: the bundle's tuning.
        max_errors: "N" or "P%". With more broken images, the run writes its table and then fails.
        probabilities: Add a column with the probabilities of all classes.
        embeddings: Add a column with the network's features; Parquet only.
        column: Column of the paths in CSV, JSON and Parquet lists of inputs.
        addresses: Protocols of addresses that lists may contain besides those of the inputs, such
            as "s3,https".
        copy_to: Folder for a copy of every image, in a folder for each label.
        restart: Discard the rows of an unfinished run.
        engine: "local", or "ray" to run on a Ray cluster.
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
        """Protocols that addresses may have: those of `inputs` and of `addresses`."""
        return sources.protocols(inputs, self.addresses)

    def images_per_run(self, batch: int) -> int:
        """Images of one run of the graph with `batch` rows; at least 1."""
        return max(1, batch // max(1, self.tta))

    def check(self, inputs: Sequence[str], out: Path) -> None:
        """Check all values before any image is scored.

        Raises:
            OptionError: A value can't be used.
        """
        for name, least in (("top_k", 1), ("workers", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"--{name.replace('_', '-')} {value}: use {least} or more")
        parse_error_limit(self.max_errors)
        if self.engine == "ray" and is_table_folder(out):
            check_table_folder(out)
        else:
            check_table(out, features=self.embeddings)
        if self.copy_to is not None:
            check_folder(self.copy_to, "--copy-to")
            target = self.copy_to.resolve()
            for name in inputs:
                if Path(name).is_dir() and target.is_relative_to(Path(name).resolve()):
                    raise OptionError(f"--copy-to {self.copy_to} lies in {name}, which is scored")
