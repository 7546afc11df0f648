"""Checks before the service starts: bundle, precision, runtime and device.

Each check raises an error for a configuration that no worker could serve. As a command, `python -m
serving.server.preflight` opens the bundle on the device that FLEDGE_DEVICE names and exits. Opening
a bundle predicts its golden images, which are photos with stored expected probabilities.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from serving.bundle import storage
from serving.bundle.manifest import Manifest
from serving.errors import BundleError, FledgeError, OptionError
from serving.server import single_process
from serving.settings import Settings
from serving.utils.optional_packages import require


def check(settings: Settings) -> None:
    """Run all checks; BentoML's launcher calls it before it starts its workers.

    Raises:
        BundleError: The bundle can't be used.
        OptionError: The GPU can't be used, or the bundle lacks the precision.
    """
    check_bundle(settings)
    check_gpu(settings, os.environ)


def check_bundle(settings: Settings) -> Manifest:
    """Check all that can be checked without loading a graph, and return the manifest.

    Raises:
        BundleError: The bundle can't be used.
        OptionError: The bundle lacks the precision, or the runtime can't use the device.
    """
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


def check_gpu(settings: Settings, env: Mapping[str, str]) -> None:
    """Open the bundle on the GPU, if FLEDGE_DEVICE names one.

    Raises:
        BundleError: On the GPU, the golden images give other probabilities than the stored ones.
        OptionError: The GPU can't be used.
    """
    if settings.device not in ("cuda", "tensorrt"):
        return
    # In a process of its own, so that the launcher, which serves nothing, holds no GPU memory.
    result = subprocess.run(
        [sys.executable, "-m", "serving.server.preflight"],
        cwd=single_process.ROOT,
        env=env,
        text=True,
        stderr=subprocess.PIPE,
        check=False,
    )
    if result.returncode:
        kind = BundleError if result.returncode == BundleError.exit_status else OptionError
        raise kind((result.stderr.strip().splitlines() or ["the device check failed"])[-1])


def _check_torchscript(settings: Settings, manifest: Manifest) -> None:
    require("torch", "FLEDGE_RUNTIME = torchscript", "pip install 'fledge[train]'")
    if settings.precision not in ("auto", "fp32") or settings.device == "tensorrt":
        raise OptionError("FLEDGE_RUNTIME = torchscript: answers in fp32, on cpu or cuda")
    if manifest.torchscript is None:
        raise BundleError(f"{settings.bundle} has no TorchScript graph; export it again")


def _open_on_device() -> int:
    """Open the bundle as a worker would; print an error to stderr and return the exit status."""
    from serving.inference.load import open_predictor

    try:
        settings = Settings.from_env()
        open_predictor(
            settings.bundle,
            device=settings.device,
            precision=settings.precision,
            kind=settings.runtime,
        )
    except FledgeError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(_open_on_device())
