"""Options of batch scoring (`fledge score`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.errors import OptionError
from serving.inputs import sources
from serving.scoring.summary import parse_error_limit
from serving.scoring.table import check_table
from serving.scoring.table_folder import check_table_folder, is_table_folder
from serving.terminal import quote_path
from serving.utils.files import check_folder


@dataclass(frozen=True)
class ScoringOptions:
    """Options of `fledge score`; each field has the name of the command-line option.

    Attributes:
        tta: Number of the bundle's TTA views (crops or flips of an image) to average. 0 and 1 both
            mean that only the unaugmented view is used.
        top_k: Number of most probable classes in a table row; all classes if the model has fewer.
        device: auto, cpu, cuda or tensorrt.
        precision: auto, fp32, int8 or fp16.
        workers: Number of threads, all of which may run the ONNX graph at the same time. None: one
            thread for each CPU core; on a CPU, the number of simultaneous runs of the graph is then
            the one measured at export. With `engine` "ray": number of actors; None: one for each
            core, or for each GPU.
        batch: Number of TTA views in one run of the graph, counted over all images. None: the
            number measured at export, if the bundle has it, else 1 on a CPU and 16 on a GPU.
        max_errors: Allowed number ("N") or percentage ("P%") of images that can't be scored. With
            more, the run writes its table and then fails. None: no limit.
        probabilities: Whether the table has a column with the probabilities of all classes.
        embeddings: Whether the table has a column with the network's features; Parquet only.
        csv_safe: Whether an apostrophe is put before texts in CSV that a spreadsheet would take for
            formulas.
        csv_bom: Whether CSV begins with a byte-order mark, by which spreadsheets recognise UTF-8.
        column: Name of the column that has the paths, in inputs that are CSV, JSON or Parquet
            lists.
        addresses: Protocols that addresses in lists may have, in addition to those of the inputs;
            separated by commas, such as "s3,https".
        root: Folder that must contain all local files, links followed; others become rows with an
            error. None: no limit.
        max_pixels: Largest width times height of an image. None: `limits.max_pixels_of_commands`.
        copy_to: Folder into which every image is copied, in a subfolder for each label.
        restart: Whether to discard the rows of an unfinished run.
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
    csv_safe: bool = False
    csv_bom: bool = False
    column: str | None = None
    addresses: str = ""
    root: Path | None = None
    max_pixels: int | None = None
    copy_to: Path | None = None
    restart: bool = False
    engine: str = "local"

    def protocols(self, inputs: Sequence[str]) -> list[str]:
        """Return the protocols that addresses may have: those in `inputs` and in `addresses`."""
        return sources.protocols(inputs, self.addresses)

    def images_per_run(self, batch: int) -> int:
        """Return how many images fit in a run of the graph with `batch` TTA views; at least 1."""
        return max(1, batch // max(1, self.tta))

    def check(self, inputs: Sequence[str], out: Path) -> None:
        """Check all options. Called before any image is scored.

        Args:
            inputs: Inputs as on the command line.
            out: Path of the table.

        Raises:
            OptionError: An option has an invalid value, or the table can't be written to `out`.
        """
        for name, least in (("top_k", 1), ("workers", 1), ("batch", 1), ("max_pixels", 64)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"--{name.replace('_', '-')} {value}: use {least} or more")
        if self.root is not None and not self.root.is_dir():
            raise OptionError(f"--root {self.root}: no folder; name one that has all images")
        parse_error_limit(self.max_errors)
        if self.engine == "ray" and is_table_folder(out):
            check_table_folder(out)
        else:
            check_table(out, features=self.embeddings)
        for name in ("csv_safe", "csv_bom"):
            if getattr(self, name) and out.suffix.lower() != ".csv":
                option = f"--{name.replace('_', '-')}"
                name = quote_path(out.with_suffix(".csv"))
                raise OptionError(f"{option} is for CSV; use --out {name}")
        if self.copy_to is not None:
            check_folder(self.copy_to, "--copy-to")
            target = self.copy_to.resolve()
            for name in inputs:
                if Path(name).is_dir() and target.is_relative_to(Path(name).resolve()):
                    raise OptionError(f"--copy-to {self.copy_to} lies in {name}, which is scored")
