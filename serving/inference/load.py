"""Open a bundle for inference: choose precision and runtime, and check the golden images.

Golden images are photos in the bundle whose expected probabilities are stored in the manifest. When
a bundle is opened, the golden images are predicted, and the results are compared with the stored
probabilities.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from serving.bundle import storage
from serving.bundle.manifest import measured_parallelism, multithreading_pays
from serving.bundle.storage import Bundle
from serving.errors import BundleError, ImageError, OptionError, WorkError
from serving.imaging.tta import Probabilities
from serving.inference import runtime
from serving.inference.predictor import Predictor
from serving.inference.runtime import OnnxRuntime, PaddedBatchRuntime, Runtime
from serving.utils.cpu import cores

MAX_TOLERANCE: Final = 0.05
"""Largest tolerance that a manifest may state. A larger tolerance would make the check useless."""


def open_predictor(
    folder: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = 1,
    low_latency_threads: int = 1,
    kind: str = "onnx",
    before_load: Callable[[Bundle], object] | None = None,
    golden_seconds: float | None = None,
) -> Predictor:
    """Open a bundle, and check that it gives the same answers on this machine as at export.

    Args:
        folder: The bundle.
        device: cpu, cuda, tensorrt or auto. auto: CUDA if it works, else the CPU.
        precision: fp32, int8, fp16 or auto. auto: int8 on a CPU and fp16 on a GPU if the bundle has
            a graph of this precision, else fp32.
        threads: CPU threads of one run of the graph. None: the number that was fastest at
            export, or 1 if none was measured.
        low_latency_threads: CPU threads of a run while only one image is in progress. Ignored if
            several threads were not faster than one in the measurements at export.
        kind: The runtime, onnx or torchscript. TorchScript has fp32 only and needs torch.
        before_load: Function that is called after the files were verified and before a graph is
            loaded; see `isolated_load.limits`.
        golden_seconds: Time limit of predicting the golden images; None: no limit.

    Raises:
        BundleError: A file is missing or was changed, or the golden images (photos stored with
            expected probabilities) get other probabilities.
        OptionError: The device is not available, or the bundle has no graph of the precision.
    """
    bundle = storage.read(folder)
    if before_load:
        before_load(bundle)
    predictor = _open(bundle, device, precision, threads, low_latency_threads, kind)
    with _time_limit(predictor, golden_seconds):
        check_golden(predictor, bundle)
    return predictor


@contextmanager
def _time_limit(predictor: Predictor, seconds: float | None) -> Iterator[None]:
    """Make the predictor's runs fail if the block takes longer than `seconds`."""

    def stop() -> None:
        for engine in (predictor.runtime, predictor.low_latency_runtime):
            if engine:
                runtime.stop_runs(engine)

    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def verify(
    folder: Path, device: str = "cpu", before_load: Callable[[Bundle], object] | None = None
) -> list[str]:
    """Check all files of a bundle, and the golden images at each precision; return a report.

    Golden images are photos stored with expected probabilities.

    Args:
        folder: The bundle.
        device: cpu, cuda, tensorrt or auto. auto: CUDA if it works, else the CPU.
        before_load: See `open_predictor`.

    Returns:
        The lines of the report.

    Raises:
        BundleError: A file was changed, or a probability of a golden image differs on this machine
            from the stored one by more than the tolerance.
        OptionError: The device is not available.
    """
    bundle = storage.read(folder)
    if before_load:
        before_load(bundle)
    manifest = bundle.manifest
    lines = [
        f"{folder}: {manifest.name}:{manifest.version}, {len(manifest.files)} files are as exported"
    ]
    lines += [f"signed by {signer}{bundle.signature_warning}" for signer in bundle.signers] or [
        "not signed"
    ]
    for precision, entry in manifest.precisions.items():
        predictor = _open(bundle, device, precision)
        difference = check_golden(predictor, bundle)
        lines.append(
            f"{precision} on {predictor.runtime.provider}: {len(manifest.golden)} golden images, "
            f"largest difference {difference:.1e}, tolerance {entry['tolerance']:.1e}"
        )
    return lines


def choose(bundle: Bundle, precision: str, provider: str) -> str:
    """Return the precision of the graph to run.

    Args:
        bundle: The bundle.
        precision: fp32, int8 or fp16, returned as is; or auto, the fastest precision of the bundle.
        provider: Execution provider that will run the graph.

    Raises:
        OptionError: The bundle has no graph of the requested precision.
    """
    available = bundle.manifest.precisions
    if precision not in ("auto", *available):
        text = f"precision = {precision}: {bundle.folder} has {', '.join(available)}; use one"
        raise OptionError(text)
    return _fastest(available, provider) if precision == "auto" else precision


def check_golden(predictor: Predictor, bundle: Bundle) -> float:
    """Predict the golden images and compare the results with the probabilities in the manifest.

    Golden images are photos in the bundle, stored with expected probabilities for each precision.

    Returns:
        The largest absolute difference between a predicted and an expected probability.

    Raises:
        BundleError: The bundle has no golden images, a golden image can't be predicted, a
            difference is above the tolerance in the manifest, or the tolerance is above
            `MAX_TOLERANCE`.
    """
    manifest, precision = bundle.manifest, predictor.precision
    if not manifest.golden:
        raise BundleError(f"{bundle.folder} has no golden images to check; export it again")
    try:
        tolerance = float(manifest.precisions[precision]["tolerance"])
        stated = [
            (image["file"], np.asarray(image["probabilities"][precision], np.float64))
            for image in manifest.golden
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.folder} states no golden probabilities for {precision}; export it again"
        ) from error
    if not 0 < tolerance <= MAX_TOLERANCE:
        raise BundleError(
            f"{bundle.folder}: tolerance {tolerance:.2g} of {precision} is not above 0 and at most "
            f"{MAX_TOLERANCE}; export it again"
        )
    return max(_check_image(predictor, bundle, *image, tolerance) for image in stated)


def _check_image(
    predictor: Predictor, bundle: Bundle, name: str, expected: Probabilities, tolerance: float
) -> float:
    """Return the largest difference between predicted and expected probabilities of one image.

    If the predictor has a second runtime for low latency, both runtimes are checked.
    """
    classes = len(bundle.manifest.labels)
    if expected.shape != (classes,):
        raise BundleError(
            f"{bundle.folder}: {name} has {expected.size} probabilities stated for {classes} labels"
        )
    try:
        prepared = predictor.prepare(bundle.load(name))
    except ImageError as error:
        raise BundleError(f"{bundle.payload / name} can't be read: {error}") from error
    try:
        answers = [predictor.predict([prepared])[0].probabilities]
        if predictor.low_latency_runtime:
            answers += [predictor.predict([prepared], low_latency=True)[0].probabilities]
    except WorkError as error:
        text = f"{bundle.folder} must not be served here: its graph can't be run"
        raise BundleError(text, details=str(error)) from error
    if answers[0].shape != expected.shape:
        raise BundleError(
            f"{bundle.folder}: the graph gives {answers[0].size} probabilities for {classes} labels"
        )
    difference = float(np.abs(np.stack(answers) - expected).max())
    if not difference <= tolerance:
        raise BundleError(
            f"{bundle.folder} must not be served here: {name} in {predictor.precision} on "
            f"{predictor.runtime.provider} is off by {difference:.2g}, tolerance {tolerance:.2g}"
        )
    return difference


def _open(
    bundle: Bundle,
    device: str,
    precision: str,
    threads: int | None = 1,
    low_latency_threads: int = 1,
    kind: str = "onnx",
) -> Predictor:
    """Open a bundle like `open_predictor`, but without predicting the golden images."""
    chosen = choose(bundle, precision, runtime.expected(device))
    if kind == "torchscript":
        return _predictor(bundle, _torchscript(bundle, device, precision, threads or 1), "fp32")
    engine = _onnx(bundle, chosen, device, threads)
    available = bundle.manifest.precisions
    if precision == "auto" and chosen != _fastest(available, engine.provider):
        # `auto` expected a GPU, but its provider did not load, so choose for the CPU.
        chosen = _fastest(available, engine.provider)
        engine = _onnx(bundle, chosen, "cpu", threads)
    low_latency = None
    if (
        runtime.on_cpu(engine.provider)
        and low_latency_threads > (threads or 1)
        and multithreading_pays(bundle.manifest, chosen, low_latency_threads)
    ):
        low_latency = _onnx(bundle, chosen, "cpu", low_latency_threads)
    return _predictor(bundle, engine, chosen, low_latency)


def _predictor(
    bundle: Bundle, engine: Runtime, precision: str, low_latency_runtime: Runtime | None = None
) -> Predictor:
    """Create the predictor. On a GPU, batches are padded to a few sizes (`PaddedBatchRuntime`)."""
    if not runtime.on_cpu(engine.provider):
        engine = PaddedBatchRuntime(engine, bundle.manifest.preprocess.size)
    return Predictor(bundle.manifest, engine, precision, low_latency_runtime)


def _torchscript(bundle: Bundle, device: str, precision: str, threads: int) -> Runtime:
    # Imported only when used, because it needs torch, which is not installed with the service.
    from serving.inference.torchscript import TorchScriptRuntime

    if precision not in ("auto", "fp32"):
        raise OptionError(f"precision = {precision}: TorchScript has fp32 only")
    name = bundle.manifest.torchscript
    if name is None:
        raise BundleError(f"{bundle.folder} has no TorchScript graph; export it again")
    return TorchScriptRuntime(
        bundle.payload / name, device=device, threads=threads, data=bundle.load(name)
    )


def _onnx(bundle: Bundle, precision: str, device: str, threads: int | None) -> OnnxRuntime:
    path = bundle.graph(precision)
    threads = threads or measured_parallelism(bundle.manifest, precision, cores()).threads
    data = bundle.load(path.relative_to(bundle.payload).as_posix())
    return OnnxRuntime(path, device=device, threads=threads, data=data)


def _fastest(available: Container[str], provider: str) -> str:
    """Return int8 on a CPU or fp16 on a GPU if available, else fp32.

    The accuracy need not be compared here: an export includes int8 and fp16 graphs only if their
    accuracy is acceptable.
    """
    faster = "int8" if runtime.on_cpu(provider) else "fp16"
    return faster if faster in available else "fp32"
