"""One HTML page a run: how good it is, where it goes wrong, how it was trained. Opens anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from serving.errors import OptionError
from serving.utils.files import write_aside
from training.config.sections import TtaConfig
from training.evaluation import metrics
from training.evaluation.evaluate import EvaluationResult, evaluate, recipe_of
from training.report import charts, mistakes, training_curves
from training.report.charts import text
from training.run import checkpoint
from training.run.checkpoint import CheckpointInfo
from training.utils.console import Log

REPORT: Final = "report.html"
"""Of a run's best checkpoint; that of another one bears its name, as `report-head.html`."""

_PARTS: Final = {
    "train": (
        "training",
        "The network was trained on these photos: the figures say nothing about new ones.",
    ),
    "valid": (
        "validation",
        "The best epoch was chosen on these photos, so the figures flatter a little. "
        "A test part, where there is one, tells the truth: fledge report RUN --part test.",
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
    """Write `report.html` into a run's folder; returns its path.

    A checkpoint that is not the run's best gets a page of its own beside it, `report-STAGE.html`.
    Photos that are gone or broken are left out and named.

    Args:
        run: Run folder or checkpoint.
        say: Takes lines for a person.
        part: "valid", "test" or "train".
        tta: Test-time augmentation; none where not given.
        data_folder: Where the photos are now, if they have moved.
        result: What `evaluate` gave for the same arguments, where that is known already.
        device: As `evaluate`.

    Raises:
        FledgeError: As `evaluate`.
    """
    folder = checkpoint.folder_of(run)
    weights = checkpoint.find(run)
    info = checkpoint.read_info(weights.with_suffix(".json"))
    stage = "" if weights.name == checkpoint.BEST else weights.stem
    if result is None:
        result = evaluate(run, part=part, tta=tta, data_folder=data_folder, device=device, log=log)
    sections = (
        _headline(folder, info, result, part, tta, stage),
        mistakes.section(result, info.preprocess, log),
        _classes(result),
        _calibration(result),
        training_curves.section(folder, log),
        _recipe(folder, info, result, stage),
    )
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    name = text(f"{info.name}, {stage}" if stage else info.name)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{name}: {result.accuracy:.1%}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )
    path = folder / (f"report-{stage}.html" if stage else REPORT)
    with write_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def tta_of(run: Path, log: Log) -> TtaConfig:
    """The test-time augmentation of a run's recipe; the default where that can't be read."""
    checkpoint.read_info(
        checkpoint.find(run).with_suffix(".json")
    )  # no run: say that, and only that
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
) -> str:
    plain = metrics.accuracy(result.plain, result.labels)
    rows = [("plain", plain, metrics.interval(round(plain * result.photos), result.photos))]
    right = round(result.accuracy * result.photos)
    if result.views > 1:
        rows.append(("TTA", result.accuracy, metrics.interval(right, result.photos)))
    low, high = rows[-1][2]
    name, caution = _PARTS[part]
    title = text(info.name)
    if stage:
        title += f", {text(stage)}"
        ours = f"Of the checkpoint {text(stage)}, not of the run's best. "
        caution = ours + ("" if part == "valid" else caution)
    how = f"with TTA over {result.views} views of each" if result.views > 1 else "each seen once"
    facts = {
        "network": f"{text(info.arch)} at {info.preprocess.size} px",
        "classes": f"{len(result.classes)}",
        "photos": f"{result.photos:,}",
        "wrong": f"{result.photos - right:,}",
        "log loss": f"{metrics.log_loss(result.probabilities, result.labels):.3f}",
    }
    if len(result.classes) > 5:
        facts["among the first 5"] = f"{metrics.top_k(result.probabilities, result.labels, 5):.1%}"
    else:
        facts["mean confidence"] = f"{result.probabilities.max(axis=1).mean():.1%}"
    seconds = training_curves.seconds(folder)
    if seconds:
        facts["training epochs"] = _duration(seconds)
    kinds = "" if tta is None or result.views == 1 else f" TTA: {tta.kind}, {tta.average}."
    listed = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    chart = charts.intervals(rows, f"Accuracy with its 95% interval, {low:.1%} to {high:.1%}")
    return f"""<header>
<p class="kicker">Fledge report, run <bdi>{text(folder.resolve().name)}</bdi></p>
<h1><bdi>{title}</bdi></h1>
<div class="hero">
<div><div class="figure">{result.accuracy:.1%}</div>
<p>right on {right:,} of {result.photos:,} {name} photos, {how}</p></div>
<figure class="card">{chart}
<figcaption>Accuracy and its 95% interval (Wilson): with so many photos, another draw of them
would likely land between {low:.1%} and {high:.1%}.{kinds}</figcaption></figure>
</div>
<dl class="facts">{listed}</dl>
<p class="note" style="margin-top:1rem">{caution}{_broken(result)}</p>
</header>
"""


def _broken(result: EvaluationResult) -> str:
    return f" Left out, gone or broken: {result.broken} photos." if result.broken else ""


def _classes(result: EvaluationResult) -> str:
    def figures(probabilities: metrics.Probabilities) -> metrics.PerClass:
        matrix = metrics.confusion(probabilities.argmax(axis=1), result.labels, len(result.classes))
        return metrics.per_class(matrix)

    plain, found = figures(result.plain), figures(result.probabilities)
    with_tta = result.views > 1
    recalls = np.stack([plain.recall, found.recall])[: 1 + with_tta]
    tall = "tall" if len(result.classes) > 30 else "wide"
    heads = ["class", "photos", "recall"] + ["with TTA"] * with_tta + ["precision", "F1"]
    order = np.lexsort((np.arange(len(found.recall)), found.f1, found.recall))  # NaN last
    rows = []
    for i in order:
        shares = (*recalls[:, i], found.precision[i], found.f1[i])
        name = mistakes.name_of(result, int(i))
        rows.append(
            f'<tr><th scope="row">{name}</th><td>{found.support[i]:,}</td>'
            f"{''.join(map(_share, shares))}</tr>"
        )
    return f"""<section>
<h2>Class by class</h2>
<p class="soft">The weakest first. Recall is the share of a class's photos that were found, its
accuracy; precision is the share of the answers with its name that are right; F1 is their harmonic
mean.{" Precision and F1 are with TTA." if with_tta else ""}</p>
<div class="card table {tall}"><table><thead><tr>{
        "".join(f"<th>{head}</th>" for head in heads)
    }</tr></thead><tbody>{"".join(rows)}</tbody></table></div>
</section>
"""


def _share(share: float) -> str:
    if np.isnan(share):
        return "<td>&ndash;</td>"
    return f'<td style="--share:{share:.1%}">{share:.1%}</td>'


def _calibration(result: EvaluationResult) -> str:
    found = metrics.calibration(result.probabilities, result.labels)
    mean = float(result.probabilities.max(axis=1).mean())
    loss = metrics.log_loss(result.probabilities, result.labels)
    points = round(100 * (mean - result.accuracy), 1)
    lean = f"{'over' if points > 0 else 'under'}-confident by {abs(points):.1f} points"
    if not points:
        lean = "neither over- nor under-confident"
    title = f"Calibration: expected calibration error {found.ece:.1%}"
    return f"""<section>
<h2>How far to trust its probabilities</h2>
<div class="pair">
<figure class="card">{charts.calibration(found, title)}
<figcaption>Bars on the dashed line mean that answers given with 90% are right nine times in ten.
Paler bars hold fewer photos.</figcaption></figure>
<div>
<dl class="facts"><div><dt>calibration error (ECE)</dt><dd>{found.ece:.1%}</dd></div>
<div><dt>log loss</dt><dd>{loss:.3f}</dd></div></dl>
<p style="margin-top:1rem">On average it is {mean:.1%} sure and {result.accuracy:.1%} right:
{lean}.</p>
<p class="soft">The expected calibration error is the mean distance between how sure the answers are
and how often they are right, in ten bins (Guo et al., 2017). The log loss is the mean of
&minus;ln p, p being the probability given to the right class: sure mistakes cost most.</p>
</div>
</div>
</section>
"""


def _recipe(folder: Path, info: CheckpointInfo, result: EvaluationResult, stage: str) -> str:
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
    rows = "".join(
        f'<tr><th scope="row">{key}</th><td>{text(value)}</td></tr>' for key, value in facts.items()
    )
    try:
        recipe = (folder / "recipe.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        recipe = "recipe.toml is gone"
    shown = "\n".join(map(text, recipe.splitlines()))
    return f"""<section>
<h2>What it was made from</h2>
<div class="card table wide"><table class="words"><tbody>{rows}</tbody></table></div>
<h3>The recipe</h3>
<details class="card"><summary>recipe.toml</summary>
<div class="tall"><pre>{shown}</pre></div></details>
</section>
<footer>Written by Fledge. This page is one file: keep it, send it, open it anywhere.</footer>
"""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
