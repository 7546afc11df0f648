"""`fledge serve`: check everything that can be checked, say where it listens, become the server."""

from __future__ import annotations

import atexit
import errno
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final, NoReturn

from serving.bundle import signing, storage
from serving.bundle.manifest import Manifest
from serving.errors import BundleError, FledgeError, OptionError
from serving.server import single_process
from serving.settings import Settings, bundle_folder
from serving.utils.optional_packages import require

SCRATCH: Final = "FLEDGE_SCRATCH"
"""PID:FOLDER: the server with that process id removes that folder when it ends."""

GRACE: Final = 30
"""Seconds that requests in flight have after SIGTERM; BentoML's own default is a day."""


def serve(
    folder: Path,
    *,
    port: int = 3000,
    host: str = "127.0.0.1",
    device: str | None = None,
    precision: str | None = None,
    workers: int | None = None,
) -> NoReturn:
    """Make this process the server; with several workers, BentoML's launcher takes its place.

    Signals and exit status are the server's own.

    Args:
        folder: The bundle.
        port: TCP port to listen on.
        host: Name or address to listen on; 0.0.0.0 for every interface.
        device: As `Settings`, as are the next two; None leaves the environment's choice.
        precision: See `device`.
        workers: See `device`.

    Raises:
        OptionError: A wrong setting, or the port is in use.
        BundleError: No usable bundle.
    """
    chosen = {"FLEDGE_DEVICE": device, "FLEDGE_PRECISION": precision, "FLEDGE_WORKERS": workers}
    env = {
        **os.environ,
        **{name: str(value) for name, value in chosen.items() if value is not None},
        "FLEDGE_BUNDLE": str(folder),
        "BENTOML_DO_NOT_TRACK": "True",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    make_absolute(env)
    settings = Settings.from_env(env)
    manifest = _servable(settings)
    door = bound(host, port)
    address = door.getsockname()[0]
    url = reachable(address, port)
    if settings.workers == 1:  # else BentoML's server does, before its workers
        _try_gpu(settings, env)
    print(f"{manifest.name}:{manifest.version} on {url} (ready when {url}/readyz says 200)")
    key = '-H "Authorization: Bearer KEY" ' if settings.api_keys else ""
    photo = '--data-binary @photo.jpg -H "Content-Type: image/jpeg"'
    print(f"curl {photo} {key}{url}/predict", flush=True)
    _private_home(env)
    if settings.workers == 1:
        remove_scratch_at_the_end(env)
        single_process.serve(door, env, GRACE)
    door.close()  # BentoML's launcher binds its own
    # -P: the folder in which the operator stands is not where modules come from.
    command = [sys.executable, "-P", "-m", "bentoml", "serve", single_process.SERVICE]
    command += ["--working-dir", str(single_process.ROOT), "--host", address, "--port", str(port)]
    command += ["--timeout-graceful-shutdown", str(GRACE)]
    os.execve(sys.executable, command, env)


def make_absolute(env: MutableMapping[str, str]) -> None:
    """Write paths out in full: launcher, server and workers may stand in different folders."""
    # Not resolved: a link may be turned to new keys or another bundle while the service runs.
    env["FLEDGE_BUNDLE"] = str(bundle_folder(env).absolute())
    for name in ("FLEDGE_API_KEYS_FILE", signing.TRUSTED):
        keys = env.get(name, "").strip()
        if keys:
            env[name] = str(Path(keys).absolute())


def check(settings: Settings) -> None:
    """Refuse to start on what no worker could serve: called by the server before its workers.

    Raises:
        BundleError: No usable bundle.
        OptionError: The asked-for GPU is not there, or the bundle lacks the precision.
    """
    _servable(settings)
    _try_gpu(settings, os.environ)


def _try_gpu(settings: Settings, env: Mapping[str, str]) -> None:
    if settings.device in ("cuda", "tensorrt"):
        # In a process of its own, so that a launcher, which serves nothing, holds no GPU memory.
        command = [sys.executable, "-m", "serving.server.launch"]
        done = subprocess.run(
            command,
            cwd=single_process.ROOT,
            env=env,
            text=True,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            kind = BundleError if done.returncode == BundleError.exit_status else OptionError
            raise kind((done.stderr.strip().splitlines() or ["the device check failed"])[-1])


def _servable(settings: Settings) -> Manifest:
    """What can be known without loading a graph."""
    manifest = storage.read(settings.bundle).manifest
    have = manifest.precisions
    if settings.precision not in ("auto", *have):
        raise OptionError(
            f"FLEDGE_PRECISION = {settings.precision}: this bundle has {', '.join(have)}"
        )
    if not manifest.golden:
        raise BundleError(f"{settings.bundle} has no golden images to check; export it again")
    if settings.runtime == "torchscript":
        _torchscript(settings, manifest)
    if settings.device in ("cuda", "tensorrt") and settings.runtime == "onnx":
        from serving.inference.runtime import require  # ONNX Runtime takes its time to load

        require(settings.device)
    return manifest


def _torchscript(settings: Settings, manifest: Manifest) -> None:
    """What TorchScript can't do, told before a worker finds out."""
    require("torch", "FLEDGE_RUNTIME = torchscript", "pip install 'fledge[train]'")
    if settings.precision not in ("auto", "fp32") or settings.device == "tensorrt":
        raise OptionError("FLEDGE_RUNTIME = torchscript: answers in fp32, on cpu or cuda")
    if manifest.torchscript is None:
        raise BundleError(f"{settings.bundle} has no TorchScript graph; export it again")


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen yet: who is too early is refused.

    Raises:
        OptionError: An unknown host, a port that is out of range or in use.
    """
    if not 1 <= port <= 65535:
        raise OptionError(f"--port {port}: use 1 to 65535")
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise OptionError(f"--host {host}: no such address") from error
    door = socket.socket(family, socket.SOCK_STREAM)
    # A port that only lingers after a restart is free.
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind(where)
    except OSError as error:
        door.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise OptionError(f"--host {host}: no address of this machine") from error
        raise OptionError(
            f"--port {port} can't be had on {host}: {error.strerror}; use another --port"
        ) from error
    return door


def reachable(address: str, port: int) -> str:
    """The URL under which this machine reaches a server on a numeric address."""
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified:  # every interface: no place that a client could ask
        ip = ipaddress.ip_address("127.0.0.1" if ip.version == 4 else "::1")
    return f"http://{ip if ip.version == 4 else f'[{ip}]'}:{port}"


def _private_home(env: dict[str, str]) -> None:
    """A home of this server's own: BentoML writes there, and wipes the metrics of any other."""
    env.pop(SCRATCH, None)
    try:
        scratch = tempfile.mkdtemp(prefix="fledge-")
    except OSError:
        return  # a read-only machine: BentoML's own home will have to do
    env["BENTOML_HOME"] = scratch
    env[SCRATCH] = f"{os.getpid()}:{scratch}"  # execve keeps the process id


def remove_scratch_at_the_end(env: Mapping[str, str]) -> None:
    """Remove this process's scratch folder when it ends.

    Not where the variable came from elsewhere: it may name anybody's folder.
    """
    pid, _, scratch = env.get(SCRATCH, "").partition(":")
    if scratch and pid == str(os.getpid()):
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)


def _try_device() -> int:
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
    raise SystemExit(_try_device())
