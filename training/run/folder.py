"""Create the run folder, write and read the files for resuming, mark the run as finished."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import FailFast, TypeAdapter

from serving.errors import DataError, OptionError
from serving.terminal import quote_path
from serving.utils import json_reader
from serving.utils.files import atomic_write, check_folder, partial_of
from serving.utils.process import is_running
from serving.utils.regular_files import read_limited
from training.config import load
from training.config.schema import Recipe
from training.data.dataset import SPLIT_FILE, Dataset, write_split

RUN_FILE: Final = "run.json"
RECIPE_FILE: Final = "recipe.toml"
LAST_FOLDER: Final = "last"
STAGES_FOLDER: Final = "stages"


@dataclass(frozen=True)
class RunInfo:
    """Content of `run.json`: command-line options and facts about the dataset of a run.

    Attributes:
        source: Value of `--data`.
        root: Folder of the photos.
        fingerprint: Hash of the dataset; see `Dataset.fingerprint`.
        classes: Class names in the order of the logits.
        pretrained: Whether the body started with pretrained weights.
        device: Value of `--device`: "auto", "cpu" or "cuda".
        versions: Versions of Python, torch and torchvision at the start of the run.
    """

    source: str
    root: str
    fingerprint: str
    classes: Annotated[tuple[str, ...], FailFast()]
    pretrained: bool
    device: str
    versions: dict[str, str]


_INFO: Final = TypeAdapter(RunInfo)
_MAX_FILE: Final = 2**22  # bytes


def check_out(out: Path | None) -> None:
    """Check before training that the run folder can be created, or exists and is empty.

    A folder that only has what a killed `start_run` left is as good as an empty one.

    Args:
        out: Value of `--out`. None: the run folder will be created in `runs`.

    Raises:
        OptionError: `out` is a file or a folder with content, or the folder can't be created.
    """
    if out is not None and out.exists() and not (out.is_dir() and _is_unused(out)):
        resumable = (out / RUN_FILE).exists() and (out / LAST_FOLDER).exists()
        resume = f"fledge train --resume {quote_path(out)}"
        hint = f"resume that run with `{resume}`, or " if resumable else ""
        raise OptionError(f"--out {out} exists already; {hint}choose another folder or remove it")
    check_folder(out or Path("runs"))


def _is_unused(folder: Path) -> bool:
    present = {path.name for path in folder.iterdir()}
    present -= {name for name in present if partial_of(name) in (RECIPE_FILE, SPLIT_FILE, RUN_FILE)}
    folders, files = {LAST_FOLDER, STAGES_FOLDER}, {RECIPE_FILE, SPLIT_FILE}
    if not present <= folders | files or any(
        not (folder / name).is_dir() or any((folder / name).iterdir()) for name in present & folders
    ):
        return False
    # `start_run` creates both folders first. A recipe without them is the user's own file.
    return present >= folders or not present & files


def create_run_folder(out: Path | None, name: str) -> Path:
    """Create the run folder and return its path.

    Args:
        out: Value of `--out`. None: the first of runs/NAME, runs/NAME-2, runs/NAME-3, ... that does
            not exist yet.
        name: Name of the recipe, which replaces NAME.

    Raises:
        OptionError: `out` is a file or a folder with content, or the folder can't be created.
    """
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
    """Write the recipe, the training/validation split and `run.json` into the run folder.

    `run.json` is written last. The run can be resumed from then on.
    """
    import tomli_w

    (folder / STAGES_FOLDER).mkdir(exist_ok=True)
    (folder / LAST_FOLDER).mkdir(exist_ok=True)
    values = recipe.model_dump(mode="json", exclude={"preprocess"})
    values["preprocess"] = asdict(recipe.preprocess)
    with atomic_write(folder / RECIPE_FILE) as partial:
        partial.write_text(tomli_w.dumps(values), encoding="utf-8")
    write_split(dataset, folder / SPLIT_FILE)
    with atomic_write(folder / RUN_FILE) as partial:
        partial.write_text(json.dumps(asdict(info), indent=2) + "\n")


def finish_run(folder: Path) -> None:
    """Mark a run as finished by removing the resume state from the run folder."""
    remove_leftovers(folder)
    # A rename is atomic. After a partial removal a resumed run would start from the beginning.
    (folder / LAST_FOLDER).rename(_removed_state(folder))
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a `finish_run` that was killed left; a file that can't be removed stays."""
    shutil.rmtree(_removed_state(folder), ignore_errors=True)


def _removed_state(folder: Path) -> Path:
    return folder / f".{LAST_FOLDER}.partial"


def read_run(folder: Path) -> tuple[Recipe, RunInfo]:
    """Read the recipe and `run.json` from a run folder.

    Raises:
        DataError: `recipe.toml` or `run.json` is missing in `folder`, or can't be read.
    """
    try:
        values = json_reader.parse(read_limited(folder / RUN_FILE, _MAX_FILE), paths=True)
        info = json_reader.validate(values, _INFO)
        json_reader.check_text(info.classes)
        path = folder / RECIPE_FILE
        text = read_limited(path, load.MAX_BYTES).decode()
        recipe = load.parse(tomllib.loads(text), str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"--resume {folder}: {Path(error.filename).name} is missing: no run was started in "
            "this folder; start it with fledge train"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"--resume {folder}: its files can't be read: {reason:.300}") from error
    return recipe, info


def update_latest_link(folder: Path) -> None:
    """Set the symbolic link `runs/latest` to the run folder.

    Nothing is done if the run folder is not in `runs`, or if `runs/latest` is not a link.

    Raises:
        OSError: The link can't be made, for example because the file system has no links.
    """
    link = folder.parent / "latest"
    if folder.parent.name != "runs" or (link.exists() and not link.is_symlink()):
        return
    head = ".latest.partial-"
    for stale in folder.parent.glob(f"{head}*"):  # left by a killed process
        process = stale.name.removeprefix(head)
        if process.isdecimal() and not is_running(int(process)):
            stale.unlink(missing_ok=True)
    partial = folder.parent / f"{head}{os.getpid()}"
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder.name)
        partial.replace(link)
    finally:
        partial.unlink(missing_ok=True)
