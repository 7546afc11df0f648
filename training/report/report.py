"""Write the HTML report of a run: accuracy, mistakes, calibration, training curves and the recipe.

`report.html.jinja` is the template of the page. The functions here compute the template's values.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from markupsafe import Markup

from serving.errors import OptionError
from serving.utils.files import atomic_write
from training.config.sections import TtaConfig
from training.evaluation import metrics, shortcomings
from training.evaluation.evaluate import EvaluationResult, evaluate, recipe_of
from training.report import charts, mistakes, training_curves
from training.run import checkpoint
from training.run.checkpoint import CheckpointInfo
from training.utils.console import Log

if TYPE_CHECKING:
    from jinja2 import Template

REPORT: Final = "report.html"
"""The report of a run's best checkpoint; a stage's checkpoint gets e.g. `report-head.html`."""

_PARTS: Final = {
    "train": (
        "training",
        "The network was trained on these photos: the figures say nothing about new ones.",
    ),
    "valid": (
        "validation",
        "The best epoch was chosen on these photos, so the figures are slightly optimistic. "
        "A test part, if the data has one, gives unbiased figures: fledge report RUN --part test.",
    ),
    "test": ("test", "Nothing was trained or chosen on these photos."),
}


def write(
    run: Path,
    *,
    log: Log,
    part: str = "valid",
    tta: TtaConfig | None = None,
    data_folder: Path | None = None,
    result: EvaluationResult | None = None,
    device: str = "auto",
) -> Path:
    """Write the HTML report of a run into its folder, and return the report's path.

    The report of the best checkpoint is `report.html`, that of a stage's checkpoint
    `report-STAGE.html`. Photos that are missing or broken are left out and logged.

    Args:
        run: Run folder or checkpoint file.
        log: Function that is called with one line per photo or picture that is left out.
        part: Split to evaluate: "valid", "test" or "train".
        tta: Test-time augmentation; None is off.
        data_folder: Folder of the photos, if they were moved after training.
        result: The result of `evaluate` for the same arguments; None: `evaluate` is called.
        device: "auto", "cpu" or "cuda".

    Raises:
        FledgeError: The checkpoint can't be loaded or evaluated.
    """
    folder = checkpoint.run_folder_of(run)
    weights = checkpoint.weights_path(run)
    info = checkpoint.read_info(weights.with_suffix(".json"))
    stage = "" if weights.name == checkpoint.BEST else weights.stem
    if result is None:
        result = evaluate(run, part=part, tta=tta, data_folder=data_folder, device=device, log=log)
    page = _template().render(
        title=f"{info.name}, {stage}" if stage else info.name,
        stage=stage,
        style=Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8")),
        thumbnail=mistakes.THUMBNAIL,
        headline=_headline(folder, info, result, part, tta, stage, log),
        mistakes=mistakes.section(result, info.preprocess, log),
        classes=_classes(result),
        calibration=_calibration(result),
        training=training_curves.figures(folder, log),
        origin=_origin(folder, info, result, stage, log),
    )
    path = folder / (f"report-{stage}.html" if stage else REPORT)
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # here, because training starts without it

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: charts.printable(value) if type(value) is str else value,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": lambda number: f"{number:,}",
        "fixed": lambda number, digits: f"{number:.{digits}f}",
        "percent": lambda share, digits=1: f"{share:.{digits}%}",
    }
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def tta_of(run: Path, log: Log) -> TtaConfig:
    """Return the test-time augmentation of a run's recipe.

    If the recipe can't be read, the default is returned and a warning is logged.
    """
    # A missing run raises its own error here, without the warning.
    checkpoint.read_info(checkpoint.weights_path(run).with_suffix(".json"))
    try:
        return recipe_of(run).tta
    except OptionError as error:
        log(f"warning: {error}; taking the default [tta]")
        return TtaConfig()


def _headline(
    folder: Path,
    info: CheckpointInfo,
    result: EvaluationResult,
    part: str,
    tta: TtaConfig | None,
    stage: str,
    log: Log,
) -> dict[str, Any]:
    plain = metrics.accuracy(result.plain, result.labels)
    rows = [("plain", plain, metrics.interval(round(plain * result.photos), result.photos))]
    right = round(result.accuracy * result.photos)
    if result.views > 1:
        rows.append(("TTA", result.accuracy, metrics.interval(right, result.photos)))
    low, high = rows[-1][2]
    name, caution = _PARTS[part]
    photos, hits = shortcomings.count(result.probabilities, result.labels)
    facts = {
        "network": f"{info.arch} at {info.preprocess.size} px",
        "balanced accuracy": f"{shortcomings.balanced_accuracy(photos, hits):.1%}",
        "classes": f"{len(result.classes)}",
        "photos": f"{result.photos:,}",
        "wrong": f"{result.photos - right:,}",
        "log loss": f"{metrics.log_loss(result.probabilities, result.labels):.3f}",
    }
    if len(result.classes) > 5:
        facts["among the first 5"] = f"{metrics.top_k(result.probabilities, result.labels, 5):.1%}"
    else:
        facts["mean confidence"] = f"{result.probabilities.max(axis=1).mean():.1%}"
    seconds = training_curves.seconds(folder, log)
    if seconds:
        facts["training epochs"] = _duration(seconds)
    return {
        "run": folder.resolve().name,
        "part": name,
        # The best epoch was chosen by the best checkpoint's figures, not by those of a stage.
        "caution": "" if stage and part == "valid" else caution,
        "accuracy": result.accuracy,
        "right": right,
        "photos": result.photos,
        "broken": result.broken,
        "views": result.views,
        "tta": tta if result.views > 1 else None,
        "low": low,
        "high": high,
        "warnings": [
            *shortcomings.shortcomings(result.classes, photos, hits),
            *shortcomings.unmeasured(result.classes, photos),
        ],
        "chart": charts.intervals(rows, f"Accuracy with its 95% interval, {low:.1%} to {high:.1%}"),
        "facts": facts,
    }


def _classes(result: EvaluationResult) -> dict[str, Any]:
    def figures(probabilities: metrics.Probabilities) -> metrics.PerClass:
        matrix = metrics.confusion(probabilities.argmax(axis=1), result.labels, len(result.classes))
        return metrics.per_class(matrix)

    plain, found = figures(result.plain), figures(result.probabilities)
    with_tta = result.views > 1
    recalls = np.stack([plain.recall, found.recall])[: 1 + with_tta]
    order = np.lexsort((np.arange(len(found.recall)), found.f1, found.recall))  # NaN last
    rows = []
    for i in order:
        shares = (*recalls[:, i], found.precision[i], found.f1[i])
        defined = [None if np.isnan(share) else share for share in shares]
        rows.append((result.classes[i], found.support[i], defined))
    return {
        "columns": ["class", "photos", "recall"] + ["with TTA"] * with_tta + ["precision", "F1"],
        "rows": rows,
    }


def _calibration(result: EvaluationResult) -> dict[str, Any]:
    found = metrics.calibration(result.probabilities, result.labels)
    confidence = float(result.probabilities.max(axis=1).mean())
    points = round(100 * (confidence - result.accuracy), 1)
    lean = f"{'over' if points > 0 else 'under'}-confident by {abs(points):.1f} points"
    if not points:
        lean = "neither over- nor under-confident"
    return {
        "chart": charts.calibration(
            found, f"Calibration: expected calibration error {found.ece:.1%}"
        ),
        "error": found.ece,
        "log_loss": metrics.log_loss(result.probabilities, result.labels),
        "confidence": confidence,
        "lean": lean,
    }


def _origin(
    folder: Path, info: CheckpointInfo, result: EvaluationResult, stage: str, log: Log
) -> dict[str, Any]:
    best = f"{info.metrics.get('stage', '?')} {info.metrics.get('epoch', '?')}"
    facts = {
        "network": info.arch,
        **({"checkpoint": stage} if stage else {"best epoch": best}),
        "photos": ", ".join(
            f"{info.data[part]:,} {name}" for part, (name, _) in _PARTS.items() if part in info.data
        ),
        "photos from": result.root.name,
        "fingerprint": str(info.data.get("fingerprint", "?")),
        "seed": str(info.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
    }
    try:
        recipe = (folder / "recipe.toml").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        recipe = "recipe.toml is missing"
    except OSError as error:
        recipe = f"recipe.toml can't be read: {error.strerror or error}"
        log(f"skipped {folder / 'recipe.toml'}: {error.strerror or error}")
    return {"facts": facts, "recipe": recipe.splitlines()}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
