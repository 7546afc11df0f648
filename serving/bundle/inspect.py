"""`fledge inspect`: a bundle in words. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from serving.bundle import storage as bundle
from serving.bundle.storage import Bundle

_LABELS: Final = 8


def describe(folder: Path) -> list[str]:
    """What a bundle is, for a person: lines of a name and what it has to say.

    Raises:
        BundleError: As `bundle.read`.
    """
    opened = bundle.read(folder)
    manifest = opened.manifest
    lines = [f"{manifest.name} {manifest.version}: {manifest.arch}, {len(manifest.labels)} classes"]
    named = {
        "classes": _classes(manifest.labels),
        "pixels": _pixels(opened),
        "graphs": list(_graphs(opened)),
        "checked": _checked(manifest.parity),
        "sure": _sure(opened),
        "views": _views(opened),
        "tuning": _tuning(manifest.tuning.get("cpu", {})),
        "made from": _source(manifest.provenance),
        "files": f"{len(manifest.files)}, all as they were exported; {_size(_bytes(opened))}",
        "signed": f"by {' and '.join(opened.signers)}{opened.signature_warning}"
        if opened.signers
        else "no",
    }
    for name, said in named.items():
        for number, line in enumerate([said] if isinstance(said, str) else said):
            lines.append(f"  {'' if number else name:<10}{line}")
    return lines


def _classes(labels: tuple[str, ...]) -> str:
    more = f", and {len(labels) - _LABELS} more" if len(labels) > _LABELS else ""
    return ", ".join(labels[:_LABELS]) + more


def _pixels(opened: Bundle) -> str:
    how = opened.manifest.preprocess
    return (
        f"{how.size} x {how.size}, the middle {how.crop:g} of the short side, {how.interpolation}"
    )


def _graphs(opened: Bundle) -> Iterator[str]:
    manifest = opened.manifest
    speeds = manifest.tuning.get("cpu", {}).get("throughput", {})
    for precision, entry in manifest.precisions.items():
        words = [f"{precision}: {_size(manifest.files[str(entry['file'])]['bytes'])}"]
        if entry.get("accuracy") is not None:
            words.append(f"accuracy {entry['accuracy']:.1%}")
        if precision in speeds:
            words.append(f"{speeds[precision]['images_per_second']:.0f} images/s at export")
        yield ", ".join(words)
    for precision, found in manifest.tried.items():
        if not found.get("kept"):
            yield f"{precision}: no; {found.get('why_not')}"


def _checked(parity: Mapping[str, Any]) -> str:
    if not parity:
        return "never against a checkpoint"
    worst = max(found["largest_difference"] for found in parity["graphs"].values())
    return (
        f"against the checkpoint on {parity['photos']} held-out photos: largest difference of a "
        f"probability {worst:.1e}"
    )


def _sure(opened: Bundle) -> str:
    manifest = opened.manifest
    threshold = manifest.thresholds.get("confident")
    words = [f"temperature {manifest.temperature:g}"]
    if manifest.calibration:
        before, after = (manifest.calibration[when]["ece"] for when in ("before", "after"))
        words.append(f"calibration error {before:.1%} -> {after:.1%}")
    words.append("confident: not said" if threshold is None else f"confident from {threshold:g}")
    return ", ".join(words)


def _views(opened: Bundle) -> str:
    tta = opened.manifest.tta
    have = f"{len(opened.manifest.views)}, the plain one by default"
    if not tta:
        return have
    if not tta["advised"]:
        return f"{have}; more of them put no more of {tta['photos']} held-out photos right"
    best = next(row for row in tta["views"] if row["views"] == tta["advised"])
    return (
        f"{have}; tta={best['views']} puts {best['fixed']} of {tta['photos']} held-out photos "
        f"right and {best['broken']} wrong (p = {best['p']:.2f})"
    )


def _tuning(tuning: Mapping[str, Any]) -> list[str]:
    """Best settings of each graph, as they were measured where the bundle was made."""
    lines = []
    for name, best in tuning.get("throughput", {}).items():
        lone = tuning["latency"][name]
        lines.append(
            f"{name}: {best['workers']} x {best['threads']} threads, batch {best['batch']}; a lone "
            f"photo {lone['ms']:g} ms with {lone['threads']}"
        )
    return lines or ["not measured"]


def _source(provenance: Mapping[str, Any]) -> str:
    data = provenance.get("data", {})
    counts = f"{data.get('train', '?')} photos, {data.get('valid', '?')} held out"
    return f"run {provenance.get('run', '?')}, {data.get('source', '?')}: {counts}"


def _bytes(opened: Bundle) -> int:
    return sum(int(facts["bytes"]) for facts in opened.manifest.files.values())


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
