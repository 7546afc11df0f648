"""Run an ablation: train the recipe of each table row with the same seeds or folds.

A table row is one technique, see `training.ablation.tricks`. A trial is the training run of one row
with one seed or fold. The result of a trial is a JSON file in `OUT/trials`. An interrupted ablation
resumes from these files. A trial whose recipe or photos changed is run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from pydantic import ConfigDict, TypeAdapter, with_config

from serving.errors import OptionError, WorkError
from serving.utils import json_reader
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
from training.utils.console import Log, log_to_stderr, pluralize

TRIALS: Final = "trials"


@dataclass(frozen=True)
class AblationOptions:
    """Options of an ablation.

    Attributes:
        split: CSV file that defines the training and validation splits; see `load_dataset`.
        seeds: Number of seeds, starting with the recipe's seed. If neither the folders nor `split`
            define the splits, they are drawn with the seed, too.
        folds: Number of cross-validation folds to use instead of seeds; 0 uses seeds. If `split` is
            given, this file defines the folds. Otherwise photos are assigned to folds at random.
        device: "auto", "cpu" or "cuda".
        keep: Whether to keep the weights of the trials.
        cache_gb: Size limit of the disk cache in GB; see `disk_cache.budget_gb`.
    """

    split: Path | None = None
    seeds: int = 3
    folds: int = 0
    device: str = "auto"
    keep: bool = False
    cache_gb: float | None = None


@dataclass(frozen=True)
class PlannedRun:
    """A trial to run: one table row with one seed or fold.

    Attributes:
        row: Name of the table row.
        unit: Name of the seed or fold, such as "seed 3" or "fold 3".
        recipe: The table row's recipe with this seed or fold.
        key: Hash of the recipe and the photos, in hex digits.
        tta: Test-time augmentation (TTA) for a second evaluation; None: no evaluation with TTA.
    """

    row: str
    unit: str
    recipe: Recipe
    key: str
    tta: TtaConfig | None = None

    @property
    def name(self) -> str:
        """Name of the trial's folder; the name of its result file has `.json` appended."""
        return f"{self.row}-{self.unit.replace(' ', '')}"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class AblationRun:
    """The result of a trial.

    Attributes:
        key: Hash of the recipe and the photos, as in `PlannedRun`.
        seconds: Duration of the training run in seconds.
        accuracy: Validation accuracy from 0 to 1; None if the trial failed.
        accuracy_tta: Validation accuracy with TTA, from 0 to 1; None if it was not evaluated.
        loss: Validation loss in nats; None if the trial failed.
        train: Number of training photos.
        valid: Number of validation photos.
        error: Why the trial failed; empty if it did not.
    """

    key: str
    seconds: float
    accuracy: float | None = None
    accuracy_tta: float | None = None
    loss: float | None = None
    train: int = 0
    valid: int = 0
    error: str = ""


_TRIAL: Final = TypeAdapter(AblationRun)
_MAX_TRIAL: Final = 2**16  # bytes of a result file

Trials = dict[str, dict[str, AblationRun]]
"""Row -> unit -> trial."""


def run(
    base: Recipe,
    source: str,
    out: Path,
    rows: Sequence[Trick],
    options: AblationOptions,
    log: Log = log_to_stderr,
) -> Trials:
    """Run every trial that has no result yet, and return the results of all trials.

    Args:
        base: The recipe that the table rows change.
        source: Value of `--data`; see `load_dataset`.
        out: Folder of the ablation: a new folder, or that of an earlier ablation.
        rows: Table rows, as returned by `tricks.choose`.
        options: Seeds or folds, device and cache of the trials.
        log: Function that is called with lines about progress and warnings.

    Raises:
        OptionError: An option is out of range, a row does not fit the recipe, or `out` exists and
            contains no ablation.
        DataError: `load_dataset` can't read the data set.
        WorkError: Every row failed.
    """
    if options.folds == 1 or options.folds < 0:
        raise OptionError(f"--folds {options.folds}: use 2 or more")
    if options.seeds < 1 and not options.folds:
        raise OptionError(f"--seeds {options.seeds}: use 1 or more")
    disk_cache.budget_gb(options.cache_gb)
    plans = _plan(base, source, rows, options)
    folder = _trials_folder(out)
    # Several rows may have the same recipe and therefore the same key: the first one is run.
    unique = {plan.key: plan for plan in reversed(plans)}
    finished = _load_finished(folder, unique)
    if finished:
        log(f"{len(finished)} of {len(unique)} trials are done already in {out}")
    missing = [plan for plan in plans if unique[plan.key] is plan and plan.key not in finished]
    results = dict(finished)
    seconds = 0.0
    log_warnings = _warnings_once(log)
    for number, plan in enumerate(missing, start=1):
        try:
            trial = _run_trial(plan, source, folder / plan.name, options, log_warnings)
        except KeyboardInterrupt:
            log(
                f"interrupted: {len(results)} of {len(unique)} trials are kept in {out}; "
                "the same command goes on with the rest"
            )
            raise
        with atomic_write(folder / f"{plan.name}.json") as partial:
            partial.write_text(json.dumps(asdict(trial), indent=2) + "\n")
        if not options.keep:
            for weights in (folder / plan.name).rglob("*.safetensors"):
                weights.unlink()
        results[plan.key] = trial
        every_row_was_tried = len(results) >= min(len(rows), len(unique))
        if every_row_was_tried and all(result.error for result in results.values()):
            raise WorkError(f"no row can be run; the first: {results[plans[0].key].error}")
        seconds += trial.seconds
        left = seconds / number * (len(missing) - number)
        outcome = trial.error or f"accuracy {trial.accuracy:.2%}"
        log(
            f"{number} of {len(missing)}  {plan.row}, {plan.unit}: {outcome}; "
            f"{trial.seconds:.0f} s, about {left / 60:.0f} min left"
        )
    others = len({path.stem for path in folder.glob("*.json")} - {plan.name for plan in plans})
    if others:
        what = f"{pluralize(others, 'trial')} of other rows, seeds or folds in {out}"
        log(f"{what} {'is' if others == 1 else 'are'} left out of the table; they are kept")
    trials: Trials = {row.name: {} for row in rows}
    for plan in plans:
        trials[plan.row][plan.unit] = results[plan.key]
    return trials


def _plan(
    base: Recipe, source: str, rows: Sequence[Trick], options: AblationOptions
) -> list[PlannedRun]:
    """Plan all table rows with the first seed or fold, then all rows with the next one.

    In this order, the trials done before an interruption cover all rows.
    """
    plans = []
    for number in range(options.folds or options.seeds):
        if options.folds:
            cut = {"fold": number, "folds": 0 if options.split else options.folds}
            own = base.model_copy(update={"data": base.data.model_copy(update=cut)})
            unit = f"fold {number}"
        else:
            own = base.model_copy(update={"seed": base.seed + number})
            unit = f"seed {own.seed}"
        dataset = load_dataset(source, split=options.split, config=own.data, seed=own.seed)
        for row in rows:
            recipe = tricks.recipe_of(row, own)
            values = json.dumps([tricks.values_of(recipe), dataset.fingerprint], sort_keys=True)
            key = hashlib.sha256(values.encode()).hexdigest()[:16]
            plans.append(PlannedRun(row.name, unit, recipe, key))
    with_tta = {plan.key for plan in plans if tricks.BY_NAME[plan.row].metric == "accuracy_tta"}
    tta = tricks.views_of(base)
    return [replace(plan, tta=tta) if plan.key in with_tta else plan for plan in plans]


def _trials_folder(out: Path) -> Path:
    """Create the folder of the trials in `out`; raise OptionError if `out` has other content."""
    folder = out / TRIALS
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not folder.is_dir())):
        raise OptionError(f"--out {out} exists already and is no ablation; choose another")
    check_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _load_finished(folder: Path, planned: Mapping[str, PlannedRun]) -> dict[str, AblationRun]:
    """Return key -> result of the planned trials that succeeded earlier.

    Failed trials are not in the dict, because they are run again.
    """
    finished = {}
    for path in sorted(folder.glob("*.json")):
        try:
            trial = json_reader.read_json(path, _TRIAL, _MAX_TRIAL)
        except (OSError, ValueError) as error:
            raise OptionError(f"{path} is no trial: {error}; remove it") from error
        plan = planned.get(trial.key)
        if plan and not trial.error and (trial.accuracy_tta is not None or plan.tta is None):
            finished[trial.key] = trial
    return finished


def _warnings_once(log: Log) -> Log:
    """Return a log function that passes each warning on to `log` once and drops all other lines."""
    logged: set[str] = set()

    def log_warning(line: str) -> None:
        if line.startswith(("warning", finetune.UNPRETRAINED)) and line not in logged:
            logged.add(line)
            log(line)

    return log_warning


def _run_trial(
    plan: PlannedRun, source: str, folder: Path, options: AblationOptions, log: Log
) -> AblationRun:
    """Train and evaluate; after an OptionError or WorkError, return a result with the error."""
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted trial
    started = time.perf_counter()
    try:
        finetune.run(
            plan.recipe,
            source,
            split=options.split,
            out=folder,
            device=options.device,
            cache_gb=options.cache_gb,
            log=log,
        )
    except (OptionError, WorkError) as error:
        return AblationRun(plan.key, time.perf_counter() - started, error=str(error))
    seconds = time.perf_counter() - started
    info = read_info(folder / "best.json")
    with_tta = evaluate(folder, tta=plan.tta, log=log).accuracy if plan.tta else None
    return AblationRun(
        plan.key,
        seconds,
        accuracy=info.metrics["accuracy"],
        accuracy_tta=with_tta,
        loss=info.metrics["loss"],
        train=int(info.data["train"]),
        valid=int(info.data["valid"]),
    )
