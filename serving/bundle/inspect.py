"""Describe a bundle as text, for `fledge inspect`. Needs neither torch nor ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from serving.bundle import storage
from serving.bundle.manifest import Manifest
from serving.bundle.storage import Bundle

_MAX_LABELS: Final = 8

# What the functions of this module raise for a report with other fields or types.
_OTHER_FORM: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def describe(folder: Path) -> list[str]:
    """Check a bundle and return lines of text about it.

    The first line is a title. Every other line has a topic, such as "graphs", and facts about it. A
    report of an unknown form is named as such: reports don't decide answers, and are not validated.

    Raises:
        BundleError: The bundle is missing or damaged, or no trusted key signed it.
        OptionError: The file of trusted keys can't be used.
    """
    bundle = storage.read(folder)
    manifest = bundle.manifest
    lines = [f"{manifest.name} {manifest.version}: {manifest.arch}, {len(manifest.labels)} classes"]
    topics: dict[str, Callable[[], list[str]]] = {
        "classes": lambda: [_classes(manifest.labels)],
        "input": lambda: [_input(manifest)],
        "graphs": lambda: list(_graphs(manifest)),
        "parity": lambda: [_parity(manifest.parity)],
        "confidence": lambda: [_confidence(manifest)],
        "views": lambda: [_views(manifest)],
        "tuning": lambda: _tuning(manifest.tuning.get("cpu", {})),
        "source": lambda: [_source(manifest.provenance)],
        "files": lambda: [
            f"{len(manifest.files)}, unchanged since the export; {_size(_bytes(manifest))}"
        ],
        "signed": lambda: [_signed(bundle)],
    }
    for topic, describe_topic in topics.items():
        try:
            texts = describe_topic()
        except _OTHER_FORM:
            texts = ["in a form that this version of Fledge does not know"]
        for number, text in enumerate(texts):
            lines.append(f"  {'' if number else topic:<12}{text}")
    return lines


def _classes(labels: tuple[str, ...]) -> str:
    more = f", and {len(labels) - _MAX_LABELS} more" if len(labels) > _MAX_LABELS else ""
    return ", ".join(labels[:_MAX_LABELS]) + more


def _input(manifest: Manifest) -> str:
    preprocess = manifest.preprocess
    size = f"{preprocess.size} x {preprocess.size} pixels"
    seen = {
        "crop": f"crop {preprocess.crop:g} of the short side",
        "squish": "the whole image squished to a square",
        "pad": "the whole image padded to a square",
    }
    return (
        f"{size}, {seen[preprocess.fit]}, {preprocess.interpolation}, {preprocess.decode} decoding"
    )


def _graphs(manifest: Manifest) -> Iterator[str]:
    speeds = manifest.tuning.get("cpu", {}).get("throughput", {})
    for precision, entry in manifest.precisions.items():
        facts = [f"{precision}: {_size(manifest.files[entry['file']]['bytes'])}"]
        if entry["accuracy"] is not None:
            facts.append(f"accuracy {entry['accuracy']:.1%}")
        if precision in speeds:
            facts.append(f"{speeds[precision]['images_per_second']:.0f} images/s at export")
        yield ", ".join(facts)
    for precision, found in manifest.tried.items():
        if not found.get("kept"):
            yield f"{precision}: not in the bundle; {found.get('why_not')}"


def _parity(parity: Mapping[str, Any]) -> str:
    if not parity:
        return "not compared with a checkpoint"
    largest = max(found["largest_difference"] for found in parity["graphs"].values())
    size = ""
    if "size" in parity:
        trained = parity["size"]["trained"]
        size = f"; accuracy {trained['accuracy']:.1%} at the trained size, {trained['size']} pixels"
    return (
        f"compared with the checkpoint on {parity['photos']} held-out photos: largest difference "
        f"of a probability {largest:.1e}{size}"
    )


def _confidence(manifest: Manifest) -> str:
    threshold = manifest.thresholds.get("confident")
    facts = [f"temperature {manifest.temperature:g}"]
    if manifest.calibration:
        before, after = (manifest.calibration[when]["ece"] for when in ("before", "after"))
        facts.append(f"calibration error {before:.1%} -> {after:.1%}")
    facts.append(
        "no threshold" if threshold is None else f"confident from probability {threshold:g}"
    )
    return ", ".join(facts)


def _views(manifest: Manifest) -> str:
    tta = manifest.tta
    number = f"{len(manifest.views)}, the plain one by default"
    if not tta:
        return number
    if not tta["advised"]:
        return f"{number}; tta does not correct more of {tta['photos']} held-out photos"
    (best,) = (row for row in tta["views"] if row["views"] == tta["advised"])
    return (
        f"{number}; tta={best['views']} corrects {best['fixed']} of {tta['photos']} held-out "
        f"photos and breaks {best['broken']} (p = {best['p']:.2f})"
    )


def _tuning(tuning: Mapping[str, Any]) -> list[str]:
    """Return one line per graph with its fastest settings, as measured at export."""
    lines = []
    for name, best in tuning.get("throughput", {}).items():
        single = tuning["latency"][name]
        lines.append(
            f"{name}: workers={best['workers']} threads={best['threads']} batch={best['batch']}; "
            f"a single photo {single['ms']:g} ms with threads={single['threads']}"
        )
    return lines or ["not measured"]


def _source(provenance: Mapping[str, Any]) -> str:
    data = provenance.get("data", {})
    counts = f"{data.get('train', '?')} photos, {data.get('valid', '?')} held out"
    return f"run {provenance.get('run', '?')}, {data.get('source', '?')}: {counts}"


def _signed(bundle: Bundle) -> str:
    if not bundle.signers:
        return "no"
    return f"by {' and '.join(bundle.signers)}{bundle.signature_warning}"


def _bytes(manifest: Manifest) -> int:
    return sum(entry["bytes"] for entry in manifest.files.values())


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
