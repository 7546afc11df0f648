"""Checks before the service starts: bundle, precision, runtime and device.

A check raises an error if no worker could serve with the settings.
"""

from __future__ import annotations

import os

from serving.bundle import storage
from serving.bundle.manifest import Manifest
from serving.errors import BundleError, OptionError
from serving.inference import isolated_load
from serving.server import bentoml_config, memory_needs
from serving.settings import Settings
from serving.utils.optional_packages import require


def check(settings: Settings) -> None:
    """Run all checks of this module. BentoML's launcher calls this before it starts its workers.

    Raises:
        BundleError: The bundle is missing, damaged, or must not be served.
        OptionError: The device can't be used, or the bundle has no graph of the precision, or the
            container has too little memory.
    """
    bentoml_config.check(os.environ, bentoml_serve=True)
    memory_needs.check(settings, check_bundle(settings))
    check_gpu(settings)


def check_bundle(settings: Settings) -> Manifest:
    """Check bundle, precision, runtime and device without loading a graph; return the manifest.

    Raises:
        BundleError: The bundle is missing or damaged. Or the bundle has no golden images (photos
            stored with expected probabilities). Or the settings choose TorchScript, and the bundle
            has no TorchScript graph.
        OptionError: The bundle has no graph of the precision, or the runtime can't use the device,
            or a TLS file can't be used.
    """
    if settings.tls_cert:
        from serving.server import tls  # loads uvicorn

        tls.context_of(settings)
    manifest = storage.read(settings.bundle).manifest
    precisions = manifest.precisions
    if settings.precision not in ("auto", *precisions):
        raise OptionError(
            f"FLEDGE_PRECISION = {settings.precision}: this bundle has {', '.join(precisions)}"
        )
    if not manifest.golden:
        raise BundleError(f"{settings.bundle} has no golden images to check; export it again")
    if settings.runtime == "torchscript":
        _check_torchscript(settings, manifest)
    if settings.device in ("cuda", "tensorrt") and settings.runtime == "onnx":
        from serving.inference import runtime  # imports ONNX Runtime, which takes long

        runtime.require(settings.device)
    return manifest


def check_gpu(settings: Settings) -> None:
    """Open the bundle on the GPU in a child process; does nothing if the device is not a GPU.

    In a process of its own, so that the launcher, which serves nothing, holds no GPU memory.

    Raises:
        BundleError: The bundle can't be opened. Or the probabilities that the GPU computes for the
            golden images differ from the expected probabilities in the bundle.
        OptionError: The GPU can't be used.
    """
    if settings.device in ("cuda", "tensorrt"):
        isolated_load.run(
            "open_predictor",
            settings.bundle,
            seconds=settings.load_timeout,
            device=settings.device,
            precision=settings.precision,
            kind=settings.runtime,
        )


def _check_torchscript(settings: Settings, manifest: Manifest) -> None:
    require("torch", "FLEDGE_RUNTIME = torchscript", "pip install torch")
    if settings.precision not in ("auto", "fp32") or settings.device == "tensorrt":
        raise OptionError("FLEDGE_RUNTIME = torchscript: answers in fp32, on cpu or cuda")
    if manifest.torchscript is None:
        raise BundleError(f"{settings.bundle} has no TorchScript graph; export it again")
