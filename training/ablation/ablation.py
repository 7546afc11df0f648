"""An ablation: every row of the table of tricks trained alike, on the same seeds or folds.

Each trial is a short run of its own. What it found is a file, so that an ablation that was stopped
goes on where it was; a trial whose recipe or photos have changed since is done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from serving.errors import OptionError, WorkError
from serving.utils.files import atomic_write, check_folder
from training.ablation import tricks
from training.ablation.tricks import Trick
from training.config.schema import Recipe
from training.config.sections import TtaConfig
from training.data.dataset import load_dataset
from training.engine import finetune
from training.evaluation.evaluate import evaluate
from training.run.checkpoint import read_info
from training.utils import disk_cache
from training.utils.console import Log, pluralize
from training.utils.console import log_to_stderr as say_aloud

TRIALS: Final = "trials"


@dataclass(frozen=True)
class PlannedRun:
    """A trial to be done. unit: "seed 3" or "fold 3"; key: hex digits of recipe and photos."""

    row: str
    unit: str
    recipe: Recipe
    key: str

    @property
    def name(self) -> str:
        """Of its folder and its file."""
        return f"{self.row}-{self.unit.replace(' ', '')}"


@dataclass(frozen=True)
class AblationRun:
    """What a trial found.

    accuracy, accuracy_tta: fractions of 1, None where not measured; loss: in nats; seconds: of the
    whole run; train, valid: photos; error: why there is nothing else.
    """

    key: str
    seconds: float
    accuracy: float | None = None
    accuracy_tta: float | None = None
    loss: float | None = None
    train: int = 0
    valid: int = 0
    error: str = ""


Trials = dict[str, dict[str, AblationRun]]
"""Row -> unit -> trial."""


def run(
    base: Recipe,
    source: str,
    out: Path,
    *,
    rows: Sequence[Trick],
    split: Path | None = None,
    seeds: int = 3,
    folds: int = 0,
    device: str = "auto",
    keep: bool = False,
    cache_gb: float | None = None,
    log: Log = say_aloud,
) -> Trials:
    """Do every trial that is not done yet; returns all.

    Args:
        base: The recipe that rows change.
        source: As `load_dataset`.
        out: Folder of the trials, new or an ablation's.
        rows: As `tricks.choose`.
        split: As `load_dataset`.
        seeds: How many, from the recipe's on. They draw the split, too, where nothing else does.
        folds: How many instead: those of `split`, or of the photos cut into so many.
        device: As `recipe.run`.
        keep: Keep the weights of trials.
        cache_gb: As `recipe.run`.
        say: Takes lines for a person.

    Raises:
        OptionError: A row does not fit the recipe, a folder is not an ablation's, or as
            `cache.wanted`.
        DataError: As `load_dataset`.
        WorkError: Every row failed.
    """
    if folds == 1 or folds < 0:
        raise OptionError(f"--folds {folds}: use 2 or more")
    if seeds < 1 and not folds:
        raise OptionError(f"--seeds {seeds}: use 1 or more")
    disk_cache.budget_gb(cache_gb)
    plans = list(_plans(base, source, rows, split, seeds, folds))
    folder = out / TRIALS
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not folder.is_dir())):
        raise OptionError(f"--out {out} exists already and is no ablation; choose another")
    check_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    # Rows that come to the same are run once.
    unique = {plan.key: plan for plan in reversed(plans)}
    seen = {plan.key for plan in plans if tricks.BY_NAME[plan.row].metric == "accuracy_tta"}
    done = {
        trial.key: trial
        for trial in _finished(folder)
        if trial.key in unique and (trial.accuracy_tta is not None or trial.key not in seen)
    }
    missing = [plan for plan in plans if unique[plan.key] is plan and plan.key not in done]
    if done:
        log(f"{len(done)} of {len(unique)} trials are done already in {out}")
    said: set[str] = set()

    def say_warnings(line: str) -> None:
        if line.startswith(("warning", "no trained weights")) and line not in said:
            said.add(line)
            log(line)

    seconds = 0.0
    for number, plan in enumerate(missing, start=1):
        try:
            views = tricks.views_of(base) if plan.key in seen else None
            trial = _try(
                plan, source, folder / plan.name, split, device, views, cache_gb, say_warnings
            )
        except KeyboardInterrupt:
            log(
                f"interrupted: {len(done)} of {len(unique)} trials are kept in {out}; "
                "the same command goes on with the rest"
            )
            raise
        with atomic_write(folder / f"{plan.name}.json") as aside:
            aside.write_text(json.dumps(asdict(trial), indent=2) + "\n")
        if not keep:
            for weights in (folder / plan.name).rglob("*.safetensors"):
                weights.unlink()
        done[plan.key] = trial
        if len(done) >= min(len(rows), len(unique)) and all(other.error for other in done.values()):
            raise WorkError(f"no row can be run; the first: {done[plans[0].key].error}")
        seconds += trial.seconds
        left = seconds / number * (len(missing) - number)
        result = trial.error or f"accuracy {trial.accuracy:.2%}"
        log(
            f"{number} of {len(missing)}  {plan.row}, {plan.unit}: {result}; "
            f"{trial.seconds:.0f} s, about {left / 60:.0f} min left"
        )
    others = len({path.stem for path in folder.glob("*.json")} - {plan.name for plan in plans})
    if others:
        what = f"{pluralize(others, 'trial')} of other rows, seeds or folds in {out}"
        log(f"{what} {'is' if others == 1 else 'are'} left out of the table; they are kept")
    found: Trials = {row.name: {} for row in rows}
    for plan in plans:
        found[plan.row][plan.unit] = done[plan.key]
    return found


def _plans(
    base: Recipe, source: str, rows: Sequence[Trick], split: Path | None, seeds: int, folds: int
) -> Iterator[PlannedRun]:
    """Every row of the first seed or fold, then of the next: a part is a table, too."""
    for number in range(folds or seeds):
        if folds:
            cut = {"fold": number, "folds": 0 if split else folds}
            own = base.model_copy(update={"data": base.data.model_copy(update=cut)})
            unit = f"fold {number}"
        else:
            own = base.model_copy(update={"seed": base.seed + number})
            unit = f"seed {own.seed}"
        photos = load_dataset(source, split=split, config=own.data, seed=own.seed).fingerprint
        for row in rows:
            changed = tricks.recipe_of(row, own)
            values = json.dumps([tricks.values_of(changed), photos], sort_keys=True)
            key = hashlib.sha256(values.encode()).hexdigest()[:16]
            yield PlannedRun(row.name, unit, changed, key)


def _finished(folder: Path) -> Iterator[AblationRun]:
    """The trials on the disk; failed ones are tried again."""
    for path in sorted(folder.glob("*.json")):
        try:
            trial = AblationRun(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise OptionError(f"{path} is no trial: {error}; remove it") from error
        if not trial.error:
            yield trial


def _try(
    plan: PlannedRun,
    source: str,
    folder: Path,
    split: Path | None,
    device: str,
    views: TtaConfig | None,
    cache_gb: float | None,
    log: Log,
) -> AblationRun:
    """One run; what is wrong with this row alone is its result."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try
    started = time.perf_counter()
    try:
        finetune.run(
            plan.recipe,
            source,
            split=split,
            out=folder,
            device=device,
            cache_gb=cache_gb,
            log=log,
        )
    except (OptionError, WorkError) as error:
        return AblationRun(plan.key, time.perf_counter() - started, error=str(error))
    seconds = time.perf_counter() - started
    info = read_info(folder / "best.json")
    metrics = info.metrics
    over_views = evaluate(folder, tta=views, log=log).accuracy if views else None
    return AblationRun(
        plan.key,
        seconds,
        accuracy=metrics["accuracy"],
        accuracy_tta=over_views,
        loss=metrics["loss"],
        train=int(info.data["train"]),
        valid=int(info.data["valid"]),
    )
