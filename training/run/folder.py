"""The run folder: create it, write and read the files for resuming, mark the run as finished."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from serving.errors import DataError, OptionError
from serving.utils.files import atomic_write, check_folder
from training.config import load
from training.config.schema import Recipe
from training.data.dataset import SPLIT_FILE, Dataset, write_split

RUN_FILE: Final = "run.json"
RECIPE_FILE: Final = "recipe.toml"
LAST_FOLDER: Final = "last"
STAGES_FOLDER: Final = "stages"


@dataclass(frozen=True)
class RunInfo:
    """Options and data that a run was started with, besides recipe and split: `run.json`.

    Attributes:
        source: The `--data` argument.
        root: The photos' folder.
        fingerprint: Result of `Dataset.fingerprint`.
        classes: Names in the order of the logits.
        pretrained: Whether the body started with pretrained weights.
        device: "auto", "cpu" or "cuda".
        versions: Versions of Python, torch and torchvision.
    """

    source: str
    root: str
    fingerprint: str
    classes: tuple[str, ...]
    pretrained: bool
    device: str
    versions: dict[str, str]


def check_out(out: Path | None) -> None:
    """Check before the work begins that the run folder can be created, or exists and is empty.

    Raises:
        OptionError: The folder can't be used; the message names `--out`.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        resumable = (out / RUN_FILE).exists() and (out / LAST_FOLDER).exists()
        hint = f"resume that run with --resume {out}, or " if resumable else ""
        raise OptionError(f"--out {out} exists already; {hint}choose another folder or remove it")
    check_folder(out or Path("runs"))


def create_run_folder(out: Path | None, name: str) -> Path:
    """Create the run folder: `out`, else the first free one of runs/NAME, runs/NAME-2, ..."""
    if out is not None:
        check_out(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def start_run(folder: Path, recipe: Recipe, dataset: Dataset, info: RunInfo) -> None:
    """Write recipe, split and `run.json`; once `run.json` exists, the run can be resumed."""
    import tomli_w

    values = recipe.model_dump(mode="json", exclude={"preprocess"})
    values["preprocess"] = asdict(recipe.preprocess)
    with atomic_write(folder / RECIPE_FILE) as partial:
        partial.write_text(tomli_w.dumps(values), encoding="utf-8")
    write_split(dataset, folder / SPLIT_FILE)
    (folder / STAGES_FOLDER).mkdir(exist_ok=True)
    (folder / LAST_FOLDER).mkdir(exist_ok=True)
    with atomic_write(folder / RUN_FILE) as partial:
        partial.write_text(json.dumps(asdict(info), indent=2) + "\n")


def finish_run(folder: Path) -> None:
    """Mark a run as finished by removing the resume state."""
    removed = folder / f".{LAST_FOLDER}.partial"
    shutil.rmtree(removed, ignore_errors=True)
    # A rename is atomic. After a partial removal a resumed run would start from the beginning.
    (folder / LAST_FOLDER).rename(removed)
    shutil.rmtree(removed)


def read_run(folder: Path) -> tuple[Recipe, RunInfo]:
    """Read the recipe and `run.json` that `start_run` wrote.

    Raises:
        DataError: `folder` contains no started run, or its files can't be read.
    """
    try:
        values: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
        info = RunInfo(**{**values, "classes": tuple(values["classes"])})
        path = folder / RECIPE_FILE
        recipe = load.parse(tomllib.loads(path.read_text()), str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"--resume {folder}: {Path(error.filename).name} is missing: no run was started in "
            "this folder; start it with fledge train"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"--resume {folder}: its files can't be read: {error}") from error
    return recipe, info


def update_latest_link(folder: Path) -> None:
    """Point `runs/latest` at a run folder in `runs/`; does nothing for other folders."""
    link = folder.parent / "latest"
    if folder.parent.name != "runs" or (link.exists() and not link.is_symlink()):
        return
    partial = folder.parent / f".latest.partial-{os.getpid()}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(folder.name)
    partial.replace(link)
