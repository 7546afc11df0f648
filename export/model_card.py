"""Write a bundle's model card (README.md) from its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from export.calibration import tta_summary
from serving.bundle.manifest import Manifest
from serving.imaging.preprocess import REDUCED
from training.evaluation.metrics import Labels
from training.evaluation.shortcomings import balanced_accuracy, shortcomings, unmeasured

_MAX_ROWS: Final = 100

_TEXT: Final = """\
# {name}

An image classifier: a photo in, a probability for each of {count} classes out. {arch}, fine-tuned
with Fledge. Version `{version}`.

## Classes

{labels}

## How good it is

| graph | accuracy | held-out photos |
|---|---|---|
{accuracies}

Measured on held-out photos, from their encoded bytes, plain view. They were used to choose the best
epoch, so expect a little less on new photos, and much less on photos that look different from the
training photos.

Balanced over the classes, that is the mean of their accuracies, the fp32 graph reaches
{balanced:.1%}.{warnings}

By class, the worst first:

| class | held-out photos | right | accuracy |
|---|---|---|---|
{classes}

The exported graphs were compared with the checkpoint on {photos} photos at batch sizes {batches}:

| graph | largest difference of a probability | changed best class | ties |
|---|---|---|---|
{agreements}
{input_size}
BatchNorm: {folded} of {before} folded into other layers{left}.

## How sure it is

Logits are divided by a temperature of {temperature:g} before the softmax. On {calibration_photos}
held-out photos the expected calibration error is {ece_after:.1%} with it, cross-validated, and
{ece_before:.1%} without. {confident}

Energy, -log sum exp of the logits, is at most {energy:g} for 95 % of the held-out photos. For
photos of no class it is often larger; it does not separate them reliably.

Averaged over the first N views (`tta=N`), plain by default:

| views | accuracy | photos put right | put wrong | p |
|---|---|---|---|---|
{views}

In short: {advice}.

## How it was made

{provenance}

## How to call it

`fledge serve BUNDLE --port 3000`, then `curl -F image=@photo.jpg localhost:3000/predict`; or
`fledge score FOLDER --bundle BUNDLE --out scores.csv`.

Without Fledge: `model.onnx`, `model.ts` (TorchScript) and `model.pt2` (`torch.export.load`) take
`pixels`, uint8 `[batch, {size}, {size}, 3]`, RGB, and give `logits`, float32 `[batch, {count}]`,
and `features`, float32 `[batch, {width}]`. They normalise inside. Decode the photo upright{decode},
{fit} {size} x {size} ({interpolation}, antialiased), and take
the softmax of the logits{by}.

## Limits

- It knows the classes above only: a photo of anything else is assigned to one of them, too.
- Probabilities are calibrated for photos like the training photos only.
- Biases of the training photos are in the model. They were not examined for this card.
- `golden/` holds copies of a few held-out photos, with which a service checks itself at its start.
  Their licence applies to the bundle.
"""

_DECODE: Final = {
    "full": "",
    "scaled": " (a large one may be reduced by an integer, so that the network sees a part of at\n"
    "least {least} pixels a side)",
}
_FIT: Final = {
    "crop": "cut the centre square of {crop:g} of the short side, resize it to",
    "squish": "resize it, whole and whatever its shape, to",
    "pad": "put it in the middle of a square of the colour RGB {background}, resize that to",
}


def card(manifest: Manifest) -> str:
    """Return the text of the bundle's README.md; equal manifests give equal texts."""
    labels, report, norm = manifest.labels, manifest.parity, manifest.batchnorm
    photos, right = _counts(manifest)
    warnings = [*shortcomings(labels, photos, right), *unmeasured(labels, photos)]
    more = f", and {len(labels) - _MAX_ROWS} more" if len(labels) > _MAX_ROWS else ""
    left = dict(norm["left"])
    outputs = manifest.graph["outputs"]
    preprocess = manifest.preprocess
    calibration, advice = manifest.calibration, manifest.tta
    energy = manifest.thresholds["energy"]
    assert calibration is not None
    assert advice is not None
    assert energy is not None
    return _TEXT.format(
        name=manifest.name,
        version=manifest.version,
        arch=manifest.arch,
        count=len(labels),
        labels=", ".join(labels[:_MAX_ROWS]) + more,
        accuracies="\n".join(
            f"| {graph} | {share:.1%} | {report['photos']} |"
            for graph, share in report["accuracy"].items()
        ),
        classes="\n".join(_classes(manifest)),
        balanced=balanced_accuracy(photos, right),
        warnings="".join(f"\n\n**Warning**: {line}." for line in warnings),
        photos=report["photos"],
        batches=", ".join(str(size) for size in report["batches"]),
        agreements="\n".join(
            f"| {graph} | {agreement['largest_difference']:.1e} | {agreement['top1_changed']} "
            f"| {agreement['ties']} |"
            for graph, agreement in report["graphs"].items()
        ),
        input_size=_input_size(report.get("size")),
        folded=norm["folded"],
        before=norm["before"],
        left=f"; {len(left)} became one multiply-add each" if left else "",
        calibration_photos=calibration["photos"],
        ece_before=calibration["before"]["ece"],
        ece_after=calibration["after"]["ece"],
        confident=_confident(calibration.get("confident")),
        energy=energy,
        views="\n".join(
            f"| {row['views']} | {row['accuracy']:.1%} | {row['fixed']} | {row['broken']} "
            f"| {row['p']:.2f} |"
            for row in advice["views"]
        ),
        advice=tta_summary(advice),
        provenance=_lines(manifest.provenance),
        size=preprocess.size,
        decode=_DECODE[preprocess.decode].format(least=REDUCED * preprocess.size),
        fit=_FIT[preprocess.fit].format(crop=preprocess.crop, background=preprocess.background),
        interpolation=preprocess.interpolation,
        width=outputs["features"]["shape"][1],
        temperature=manifest.temperature,
        by="" if manifest.temperature == 1 else f" divided by {manifest.temperature:g}",
    )


def _counts(manifest: Manifest) -> tuple[Labels, Labels]:
    """Return the held-out photos and the right answers of each class, int64 [C]."""
    photos, right = np.zeros((2, len(manifest.labels)), np.int64)
    for row in manifest.parity["classes"]:
        photos[row["class"]], right[row["class"]] = row["photos"], row["right"]
    return photos, right


def _classes(manifest: Manifest) -> Iterator[str]:
    rows = sorted(manifest.parity["classes"], key=lambda row: row["right"] / row["photos"])
    for row in rows[:_MAX_ROWS]:
        label = manifest.labels[row["class"]].replace("|", "\\|")
        yield f"| {label} | {row['photos']} | {row['right']} | {row['right'] / row['photos']:.0%} |"
    if len(rows) > _MAX_ROWS:
        yield f"| {len(rows) - _MAX_ROWS} more, in the manifest | | | |"


def _confident(threshold: Mapping[str, Any] | None) -> str:
    if threshold is None:
        return "The export was made without a threshold for confident answers."
    low, high = threshold["precision_interval"]
    return (
        f"An answer is called confident from a probability of {threshold['threshold']:g} on: "
        f"{threshold['coverage']:.1%} of them were, and {threshold['precision']:.1%} of these were "
        f"right ({low:.1%} to {high:.1%})."
    )


def _input_size(found: Mapping[str, Any] | None) -> str:
    """Describe the comparison with the trained size; "" if the input has that size."""
    if found is None:
        return ""
    here, trained = found["exported"], found["trained"]
    speed, before = (one["images_per_second"]["fastest"] for one in (here, trained))
    change, limit = 0 - here["fell_points"], here["fell_at_most"]
    return f"""
The network was trained at {trained["size"]} x {trained["size"]} pixels and is exported at
{here["size"]} x {here["size"]}, at which all other figures of this card were measured. On the same
{found["photos"]} held-out photos the accuracy is {here["accuracy"]:.2%} at {here["size"]} and
{trained["accuracy"]:.2%} at {trained["size"]}: a change of {change:+.2f} points; it falls
by at most {limit:.2f} with 95 % confidence. On the machine of the export the float32 graph was
{here["times_trained"]:.2f} times as fast; at best {speed:.0f} and {before:.0f} images/s.
"""


def _lines(values: object) -> str:
    """Format a nested dict as a Markdown list, such as `- data: photos 1088, source flowers`."""
    assert isinstance(values, dict)
    return "\n".join(f"- {key}: {_plain(value)}" for key, value in values.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
