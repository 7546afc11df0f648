"""Start the HTTP server for `fledge serve`: check the settings, print the URL, run the server.

One worker runs in this process. For several workers, BentoML's launcher replaces this process
(`execve`) and starts the workers.
"""

from __future__ import annotations

import atexit
import errno
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final, NoReturn

from serving.bundle import signing
from serving.errors import OptionError
from serving.server import bentoml_config, memory_needs, preflight, single_process
from serving.settings import Settings, bundle_folder
from serving.terminal import show

SCRATCH: Final = "FLEDGE_SCRATCH"
"""Environment variable with the value PID:FOLDER. The server process PID removes FOLDER at exit."""

_FILES: Final = (
    "FLEDGE_API_KEYS_FILE",
    "FLEDGE_TLS_CERT",
    "FLEDGE_TLS_KEY",
    signing.TRUSTED,
    "BENTOML_CONFIG",
)
GRACE_SECONDS: Final = 30
"""Time that open requests have to finish after SIGTERM. BentoML's default is a day."""


def serve(
    folder: Path,
    *,
    port: int = 3000,
    host: str = "127.0.0.1",
    device: str | None = None,
    precision: str | None = None,
    workers: int | None = None,
) -> NoReturn:
    """Serve a bundle over HTTP until a stop signal; never returns.

    One worker runs in this process. For several workers, BentoML's launcher replaces this process.
    In both cases the process id stays the same: signals to this process reach the server, and the
    server's exit status is the exit status of the command.

    Args:
        folder: The bundle.
        port: TCP port to listen on.
        host: Host name or address to listen on; 0.0.0.0 for every interface.
        device: auto, cpu, cuda or tensorrt. None: the value of FLEDGE_DEVICE.
        precision: auto, fp32, int8 or fp16. None: the value of FLEDGE_PRECISION.
        workers: Number of worker processes. None: the value of FLEDGE_WORKERS.

    Raises:
        OptionError: A setting is wrong, or the port is in use.
        BundleError: The bundle is missing, damaged, or must not be served.
    """
    options = {"FLEDGE_DEVICE": device, "FLEDGE_PRECISION": precision, "FLEDGE_WORKERS": workers}
    env = {
        **os.environ,
        **{name: str(value) for name, value in options.items() if value is not None},
        "FLEDGE_BUNDLE": str(folder),
        "BENTOML_DO_NOT_TRACK": "True",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    make_paths_absolute(env)
    settings = Settings.from_env(env)
    bentoml_config.check(os.environ, bentoml_serve=False)
    manifest = preflight.check_bundle(settings)
    memory = memory_needs.check(settings, manifest)
    listener = bind(host, port)
    address = listener.getsockname()[0]
    url = client_url(address, port, "https" if settings.tls_cert else "http")
    _serve_name(host, address, env)
    if settings.workers == 1:  # with several, `ImageClassifier.check` does this
        preflight.check_gpu(settings)
    show(f"{manifest.name}:{manifest.version} on {url} (ready when {url}/readyz answers 200)")
    key = '-H "Authorization: Bearer KEY" ' if settings.api_keys else ""
    photo = '--data-binary @photo.jpg -H "Content-Type: image/jpeg"'
    show(f"curl {photo} {key}{url}/predict")
    show(memory, flush=True)
    _use_private_bentoml_home(env)
    if settings.workers == 1:
        remove_scratch_at_exit(env)
        single_process.serve(listener, env, GRACE_SECONDS)
    listener.close()  # BentoML's launcher binds a socket itself
    # -P: modules must not come from the current folder.
    command = [sys.executable, "-P", "-m", "bentoml", "serve", single_process.SERVICE]
    command += ["--working-dir", str(single_process.ROOT), "--host", address, "--port", str(port)]
    command += ["--timeout-graceful-shutdown", str(GRACE_SECONDS)]
    os.execve(sys.executable, command, env)


def _serve_name(host: str, address: str, env: MutableMapping[str, str]) -> None:
    """Add the name that the service listens on to FLEDGE_HOSTS, if it is a name of loopback."""
    if (
        host.lower() != "localhost"
        and host != address
        and ipaddress.ip_address(address).is_loopback
    ):
        env["FLEDGE_HOSTS"] = f"{env.get('FLEDGE_HOSTS', '')} {host}".strip()


def make_paths_absolute(env: MutableMapping[str, str]) -> None:
    """Replace relative paths of files and folders by absolute paths in the variables `env`.

    BentoML's launcher and its workers may run in different folders, where a relative path would
    lead to different files.
    """
    # Symbolic links are not resolved, because the user may replace a link to switch to new keys or
    # another bundle while the service runs.
    env["FLEDGE_BUNDLE"] = str(bundle_folder(env).absolute())
    for name in _FILES:
        path = env.get(name, "").strip()
        if path and path[0] not in "~$":  # BentoML expands these itself
            env[name] = str(Path(path).absolute())


def bind(host: str, port: int) -> socket.socket:
    """Return a TCP socket that is bound to `host` and `port` but does not listen yet.

    Connections are refused until the server listens on the socket.

    Raises:
        OptionError: The host is unknown, or the port is out of range or in use.
    """
    if not 1 <= port <= 65535:
        raise OptionError(f"--port {port}: use 1 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise OptionError(f"--host {host}: no such address") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Connections in TIME_WAIT, left by an earlier server, don't block the port.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise OptionError(f"--host {host}: no address of this machine") from error
        raise OptionError(
            f"--port {port} can't be used on {host}: {error.strerror}; use another --port"
        ) from error
    return listener


def client_url(address: str, port: int, scheme: str = "http") -> str:
    """Return the URL by which clients on this machine reach a server that listens on `address`."""
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified:  # every interface; clients need one address
        ip = ipaddress.ip_address("127.0.0.1" if ip.version == 4 else "::1")
    return f"{scheme}://{ip if ip.version == 4 else f'[{ip}]'}:{port}"


def _use_private_bentoml_home(env: dict[str, str]) -> None:
    """Set BENTOML_HOME in `env` to a new temporary folder.

    BentoML clears all metrics in its home folder at the start, also those of other servers.
    """
    env.pop(SCRATCH, None)
    try:
        scratch = tempfile.mkdtemp(prefix="fledge-")
    except OSError:
        return  # a read-only file system: BentoML's default home is used
    env["BENTOML_HOME"] = scratch
    env[SCRATCH] = f"{os.getpid()}:{scratch}"  # execve keeps the process id


def remove_scratch_at_exit(env: Mapping[str, str]) -> None:
    """Arrange that the temporary folder of this process is removed when the process exits.

    The variable FLEDGE_SCRATCH in `env` names the folder, as PID:FOLDER. If PID is not the id of
    this process, nothing is removed: the user or another server has set the variable, and FOLDER
    could be any folder.
    """
    pid, _, scratch = env.get(SCRATCH, "").partition(":")
    if scratch and pid == str(os.getpid()):
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
