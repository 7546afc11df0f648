"""A run's folder: who it belongs to, what it was asked to do, and where `runs/latest` points."""

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

RUN: Final = "run.json"
RECIPE: Final = "recipe.toml"
LAST: Final = "last"
STAGES: Final = "stages"


@dataclass(frozen=True)
class Begun:
    """What a run began with, beside its recipe and its split; `run.json`.

    pretrained: whether the body came with trained weights. device: "auto", "cpu" or "cuda".
    """

    source: str
    root: str
    fingerprint: str
    classes: tuple[str, ...]
    pretrained: bool
    device: str
    versions: dict[str, str]


def check_free(out: Path | None) -> None:
    """Refuse a folder that is in use, or that can't be made, before the work begins.

    Raises:
        OptionError: Names `--out`.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        resumable = (out / RUN).exists() and (out / LAST).exists()
        hint = f"go on with it by --resume {out}, or " if resumable else ""
        raise OptionError(f"--out {out} exists already; {hint}choose another or remove it")
    check_folder(out or Path("runs"))


def claim(out: Path | None, name: str) -> Path:
    """Make the run's folder; two runs that start together get two."""
    if out is not None:
        check_free(out)
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


def begin(folder: Path, recipe: Recipe, dataset: Dataset, begun: Begun) -> None:
    """Write down what the run is; from `run.json` on it can be resumed."""
    import tomli_w

    values = recipe.model_dump(mode="json", exclude={"preprocess"})
    values["preprocess"] = asdict(recipe.preprocess)
    with atomic_write(folder / RECIPE) as aside:
        aside.write_text(tomli_w.dumps(values), encoding="utf-8")
    write_split(dataset, folder / SPLIT_FILE)
    (folder / STAGES).mkdir(exist_ok=True)
    (folder / LAST).mkdir(exist_ok=True)
    with atomic_write(folder / RUN) as aside:
        aside.write_text(json.dumps(asdict(begun), indent=2) + "\n")


def close(folder: Path) -> None:
    """Mark a run as finished, and give the room back that resuming took."""
    aside = folder / f".{LAST}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    (folder / LAST).rename(aside)  # one step: killed half-way, a run would begin from the start
    shutil.rmtree(aside)


def read(folder: Path) -> tuple[Recipe, Begun]:
    """What `begin` wrote.

    Raises:
        DataError: No run there that got going.
    """
    try:
        values: dict[str, Any] = json.loads((folder / RUN).read_text())
        begun = Begun(**{**values, "classes": tuple(values["classes"])})
        recipe = load.parse(tomllib.loads((folder / RECIPE).read_text()), str(folder / RECIPE))
    except FileNotFoundError as error:
        raise DataError(
            f"--resume {folder}: {Path(error.filename).name} is missing, so no run got going here; "
            "start it anew"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"--resume {folder}: its files can't be read: {error}") from error
    return recipe, begun


def point_latest(folder: Path) -> None:
    """Point `runs/latest` at a run in `runs/`; runs elsewhere are their owner's to name."""
    link = folder.parent / "latest"
    if folder.parent.name != "runs" or (link.exists() and not link.is_symlink()):
        return
    aside = folder.parent / f".latest.partial-{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name)
    aside.replace(link)
