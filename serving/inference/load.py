"""A bundle's folder -> a predictor that has proved, here, that it answers as it did at export."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Final

import numpy as np

from serving.bundle import storage, tuning
from serving.errors import BundleError, ImageError, OptionError, WorkError
from serving.inference import runtime
from serving.inference.buckets import PaddedBatchRuntime
from serving.inference.predictor import Predictor
from serving.utils.cpu import cores

MAX_TOLERANCE: Final = 0.05
"""A golden answer may be off by a tolerance of at most this; more would check nothing."""


def open_predictor(
    folder: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = 1,
    low_latency_runtime: int = 1,
    kind: str = "onnx",
) -> Predictor:
    """Open a bundle and prove that it answers here as it did at export.

    Args:
        folder: The bundle.
        device: As `OnnxRuntime`.
        precision: fp32, int8 or fp16; auto takes int8 on a CPU and fp16 on a GPU where the bundle
            keeps them, else fp32.
        threads: Cores that one run uses on a CPU; None takes the bundle's tuning.
        wide: Cores that a run for a lone image uses there, unless the bundle's tuning found that
            more than one don't help it.
        kind: Of the runtime: onnx; or torchscript, which has fp32 only and needs torch.

    Raises:
        BundleError: Missing, changed, or the golden images give other answers than the manifest's.
        OptionError: The device is not there, or the bundle lacks the precision.
    """
    opened = storage.read(folder)
    have = opened.manifest.precisions
    chosen = choose(opened, precision, runtime.expected(device))
    if kind == "torchscript":
        return _by_torchscript(opened, device, precision, threads or 1)
    engine = _engine(opened, chosen, device, threads)
    if precision == "auto" and chosen != _fastest(have, engine.provider):
        # A GPU was seen, did not load, and auto fell back: now the CPU's own choice.
        chosen = _fastest(have, engine.provider)
        engine = _engine(opened, chosen, "cpu", threads)
    broad = None
    wider = low_latency_runtime > (threads or 1) and tuning.multithreading_pays(
        opened.manifest, chosen, low_latency_runtime
    )
    if wider and runtime.on_cpu(engine.provider):
        broad = _engine(opened, chosen, "cpu", low_latency_runtime)
    return _proved(opened, engine, chosen, broad)


def choose(opened: storage.Bundle, precision: str, provider: str) -> str:
    """The precision that `open_predictor` takes with a provider.

    Raises:
        OptionError: The bundle lacks it.
    """
    have = opened.manifest.precisions
    if precision not in ("auto", *have):
        text = f"precision = {precision}: {opened.folder} has {', '.join(have)}; use one"
        raise OptionError(text)
    return _fastest(have, provider) if precision == "auto" else precision


def _by_torchscript(opened: storage.Bundle, device: str, precision: str, threads: int) -> Predictor:
    from serving.inference.torchscript import TorchScriptRuntime  # torch, only where it is wanted

    if precision not in ("auto", "fp32"):
        raise OptionError(f"precision = {precision}: TorchScript has fp32 only")
    name = opened.manifest.torchscript
    if name is None:
        raise BundleError(f"{opened.folder} has no TorchScript graph; export it again")
    engine = TorchScriptRuntime(
        opened.payload / name, device=device, threads=threads, data=opened.load(name)
    )
    return _proved(opened, engine, "fp32")


def _proved(
    opened: storage.Bundle,
    engine: runtime.Runtime,
    precision: str,
    low_latency_runtime: runtime.Runtime | None = None,
) -> Predictor:
    """A predictor whose golden images came out right; on a GPU in batches of warmed sizes."""
    size = opened.manifest.preprocess.size
    shaped = engine if runtime.on_cpu(engine.provider) else PaddedBatchRuntime(engine, size)
    predictor = Predictor(opened.manifest, shaped, precision, low_latency_runtime)
    check_golden(predictor, opened)
    return predictor


def check_golden(predictor: Predictor, opened: storage.Bundle) -> None:
    """Compare golden images with the probabilities that the manifest states for this precision.

    Raises:
        BundleError: There are none, the engine fails on them, or an answer is off by more than the
            stated tolerance, which itself must be small enough to mean something.
    """
    manifest, precision = opened.manifest, predictor.precision
    if not manifest.golden:
        raise BundleError(f"{opened.folder} has no golden images to check; export it again")
    try:
        tolerance = float(manifest.precisions[precision]["tolerance"])
        stated = [
            (str(item["file"]), np.asarray(item["probabilities"][precision], np.float64))
            for item in manifest.golden
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{opened.folder} states no golden answers for {precision}; export it again"
        ) from error
    if not 0 < tolerance <= MAX_TOLERANCE:
        raise BundleError(
            f"{opened.folder}: tolerance {tolerance:.2g} of {precision} is not above 0 and at most "
            f"{MAX_TOLERANCE}; export it again"
        )
    for name, expected in stated:
        if expected.shape != (len(manifest.labels),):
            raise BundleError(
                f"{opened.folder}: {name} has {expected.size} probabilities stated for "
                f"{len(manifest.labels)} labels"
            )
        try:
            prepared = predictor.prepare(opened.load(name))
        except ImageError as error:
            raise BundleError(f"{opened.payload / name} can't be read: {error}") from error
        try:
            answers = [predictor.predict([prepared])[0].probabilities]
            if predictor.low_latency_runtime:
                answers += [predictor.predict([prepared], alone=True)[0].probabilities]
        except WorkError as error:
            raise BundleError(f"{opened.folder} must not be served here: {error}") from error
        if answers[0].shape != expected.shape:
            raise BundleError(
                f"{opened.folder}: the graph gives {answers[0].size} probabilities for "
                f"{len(manifest.labels)} labels"
            )
        off = float(np.abs(np.stack(answers) - expected).max())
        if not off <= tolerance:
            raise BundleError(
                f"{opened.folder} must not be served here: {name} in {precision} on "
                f"{predictor.runtime.provider} is off by {off:.2g}, tolerance {tolerance:.2g}"
            )


def _engine(
    opened: storage.Bundle, precision: str, device: str, threads: int | None
) -> runtime.OnnxRuntime:
    path = opened.graph(precision)
    threads = threads or tuning.measured_parallelism(opened.manifest, precision, cores()).threads
    data = opened.load(path.relative_to(opened.payload).as_posix())
    return runtime.OnnxRuntime(path, device=device, threads=threads, data=data)


def _fastest(have: Container[str], provider: str) -> str:
    """int8 pays on CPUs, fp16 on GPUs; the export keeps them only where accuracy allows."""
    faster = "int8" if runtime.on_cpu(provider) else "fp16"
    return faster if faster in have else "fp32"
