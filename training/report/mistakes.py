"""The report's photos: the worst mistakes, the right answers that were unsure, the confusion."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from serving.errors import ImageError
from serving.imaging import decode as images
from serving.imaging.preprocess import Preprocess
from training.evaluation import metrics
from training.evaluation.evaluate import EvaluationResult
from training.report import charts
from training.report.charts import text
from training.utils.console import Log

THUMBNAIL: Final = 176
"""Side of a photo on the page, in pixels."""
PHOTOS: Final = 24
"""Photos a gallery shows."""
CLASSES: Final = 40
"""Classes that a confusion matrix can show."""


def section(result: EvaluationResult, preprocess: Preprocess, log: Log) -> str:
    """Where the answers go wrong, as HTML; photos that can't be read any more are named."""
    probabilities, labels = result.probabilities, result.labels
    predicted = probabilities.argmax(axis=1)
    matrix = metrics.confusion(predicted, labels, len(result.classes))
    pairs = metrics.most_confused(matrix, 15)
    wrong = int((predicted != labels).sum())
    worst = metrics.top_losses(probabilities, labels, len(labels))
    worst = worst[predicted[worst] != labels[worst]][:PHOTOS]
    rows = "".join(
        f"<tr><td>{name_of(result, pair.actual)}</td><td>{name_of(result, pair.predicted)}</td>"
        f"<td>{pair.photos}</td></tr>"
        for pair in pairs
    )
    table = (
        '<div class="card table wide"><table class="words"><thead><tr><th>is</th>'
        f"<th>was taken for</th><th>photos</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    shown = _most_involved(matrix)
    some = "" if len(shown) == len(matrix) else f", the {len(shown)} classes confused most"
    heat = charts.confusion(
        matrix[np.ix_(shown, shown)],
        [result.classes[i] for i in shown],
        f"Confusion matrix{some}: actual classes down, predicted classes across",
    )
    unsure = metrics.unsure(probabilities, labels, PHOTOS)
    none = "<p>None: every photo is right.</p>"
    look = (
        "Look at them before anything else: wrong labels, two subjects in one picture and near "
        "twins all show here."
    )
    return f"""<section>
<h2>Where it goes wrong</h2>
<p class="soft">{wrong:,} of {result.photos:,} photos are wrong. {look if wrong else ""}</p>
<h3>Worst mistakes</h3>
{_gallery(preprocess, result, worst, log) if wrong else none}
<h3>Confused most</h3>
{table if pairs else none}
<h3>Confusion matrix{some}</h3>
<figure class="card"><div class="wide">{heat}</div>
<figcaption>Down: what the photo is. Across: what it was taken for.</figcaption></figure>
<h3>Right, but unsure</h3>
{_gallery(preprocess, result, unsure, log) if len(unsure) else "<p>None: no photo is right.</p>"}
</section>
"""


def name_of(result: EvaluationResult, label: int) -> str:
    """A class's name as HTML, kept apart from the direction of the text around it."""
    return f"<bdi>{text(result.classes[label])}</bdi>"


def _most_involved(matrix: metrics.Labels) -> metrics.Labels:
    """The classes to show, in their own order: all, or those with most mistakes."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")
    return np.sort(order[:CLASSES])


def _gallery(
    preprocess: Preprocess, result: EvaluationResult, chosen: metrics.Labels, log: Log
) -> str:
    loss = metrics.losses(result.probabilities, result.labels)
    figures = []
    for index in chosen:
        row, label, path = (values[index] for values in (
            result.probabilities, result.labels, result.paths
        ))  # fmt: skip
        said = int(row.argmax())
        try:
            picture = _thumbnail(path, preprocess)
        except ImageError as error:
            log(f"skipped {path}: {error}")
            continue
        name = path.name
        cost = "" if said == label else f"<small>loss {loss[index]:.2f}</small>"
        if said == label:
            words = f"<b>{name_of(result, said)}</b> {row[said]:.0%}"
            runner_up = int(np.argsort(-row, kind="stable")[1])
            more = f"or {name_of(result, runner_up)} {row[runner_up]:.0%}"
        else:
            words = f"said <b class=said>{name_of(result, said)}</b> {row[said]:.0%}"
            more = f"is <b>{name_of(result, int(label))}</b> {row[label]:.0%}"
        alt = f"{text(name)}: {text(result.classes[label])}, said {text(result.classes[said])}"
        figures.append(
            f'<figure{"" if said == label else " class=wrong"}><img src="{picture}" alt="{alt}" '
            f'width="{THUMBNAIL}" height="{THUMBNAIL}"><figcaption>{words}<br>{more}'
            f"{cost}<small><bdi>{text(name)}</bdi></small></figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figures)}</div>'


def _thumbnail(path: Path, preprocess: Preprocess) -> str:
    """What the network's plain view sees of a photo, as a data address."""
    image = images.read(path, background=preprocess.background).image
    side = (THUMBNAIL, THUMBNAIL)
    square = image.resize(side, Image.Resampling.LANCZOS, box=preprocess.centre(image))
    file = io.BytesIO()
    square.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
