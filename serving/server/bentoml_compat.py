"""Adapter for the private APIs of BentoML, circus and uvicorn that Fledge uses.

Every private API is used in this file only, in one function or constant. A new release of these
packages may change a private API without notice. `CHECKED_VERSIONS` names the releases for which
this file was checked, and `tests/serving/server/test_bentoml_compat.py` fails after an incompatible
upgrade.

BentoML takes seconds to import. Therefore each function imports these packages only when it is
called, and `fledge serve` checks the bundle and the port before it calls any of these functions.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import ssl

    import uvicorn
    from opentelemetry.sdk.trace import TracerProvider

    from serving.server.connection_limits import ConnectionLimits

CHECKED_VERSIONS: Final = {"bentoml": "1.4.39", "kantoku": "0.18.3", "uvicorn": "0.54.0"}
"""Release of each PyPI distribution. `kantoku` provides the package `circus`."""

# `_bentoml_impl.server.serving._SERVICE_WORKER_SCRIPT`: the launcher starts each worker as
# `python -m` with this module; its name distinguishes workers from other child processes.
WORKER_MODULE: Final = "_bentoml_impl.worker.service"

# `bentoml._internal.server.base_app`, `_bentoml_impl.server.app`: routes that BentoML answers.
ROUTES: Final = frozenset({"/livez", "/healthz", "/metrics", "/docs.json", "/schema.json"})

# `_bentoml_impl.server.app`: BentoML serves its OpenAPI page at this path.
OPENAPI_PAGE: Final = "/"

# `bentoml/_internal/server/static_content`: the files that the OpenAPI page loads. They are listed
# because BentoML's middleware adds a metrics label for every path it sees, known or not.
STATIC_FILES: Final = frozenset(
    f"/static_content/{name}"
    for name in (
        "favicon-dark-32x32.png",
        "favicon-light-32x32.png",
        "index.css",
        "marked.min.js",
        "swagger-initializer.js",
        "swagger-ui-bundle.js",
        "swagger-ui-standalone-preset.js",
        "swagger-ui.css",
    )
)


def service_class() -> Any:
    """Return the base class to subclass for `bentoml.service(service_class=...)`.

    The option `service_class` is not documented. The base class is `_bentoml_sdk.Service`: its
    `to_asgi(is_main)` builds the ASGI app of a worker, and its `__call__` creates the instance of
    the decorated class.
    """
    from _bentoml_sdk import Service  # type: ignore[import-untyped]

    return Service


def run_worker(arguments: Sequence[str]) -> None:
    """Run a BentoML worker in this process, without BentoML's launcher.

    Calls `_bentoml_impl.worker.service.main`, the click command that the launcher runs in each
    child process.

    Args:
        arguments: Command-line arguments of the click command.
    """
    from _bentoml_impl.worker.service import main  # type: ignore[import-untyped]

    main(list(arguments), standalone_mode=False)


def keep_metrics_in_memory() -> None:
    """Make `/metrics` report only this process; call it before the worker starts.

    By default BentoML keeps the metrics of all workers in files in the folder
    `PROMETHEUS_MULTIPROC_DIR`. This function sets `BentoMLContainer.metrics_client` to
    `PrometheusClient(multiproc=False)`.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.server.metrics.prometheus import PrometheusClient

    BentoMLContainer.metrics_client.set(PrometheusClient(multiproc=False))


def tracing_sample_rate() -> float:
    """Return the fraction of requests to trace, 0 to 1; 0 if tracing is off.

    The value is `BentoMLContainer.tracing.sample_rate`, which the user sets in BentoML's
    configuration under `services.tracing`.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    rate: float | None = BentoMLContainer.tracing.sample_rate.get()
    return rate or 0.0


def tracing_excluded_urls() -> str:
    """Return the patterns of URLs that are not traced, separated by commas; "" for none.

    The value is `BentoMLContainer.tracing.excluded_urls`, which the user sets in BentoML's
    configuration under `services.tracing`.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    urls: str | list[str] | None = BentoMLContainer.tracing.excluded_urls.get()
    return ",".join(urls) if isinstance(urls, list) else urls or ""


def user_configuration(service: str) -> dict[str, str]:
    """Return what the user has set in BentoML's configuration, as name for a service and full name.

    For example, both `services.workers` and `services.image_classifier.workers` are `workers`.
    BentoML copies what is set for all services into each section, also into `runner_connection`,
    which is no service: the copies are left out. So are settings that are equal to the default.
    The import of `bentoml._internal.configuration.containers` reads the configuration for the first
    time; BentoML builds a `BentoMLConfiguration` again when it loads a service.

    Raises:
        Exception: Whatever BentoML raises for a configuration that it can't read.
    """
    from bentoml._internal import configuration
    from bentoml._internal.configuration import helpers
    from bentoml._internal.configuration.containers import BentoMLConfiguration

    def flat(settings: Any) -> dict[str, Any]:
        return dict(helpers.flatten_dict(settings))

    default = flat(helpers.get_default_config(version=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # one of the variables is deprecated
        config = BentoMLConfiguration(
            override_config_file=configuration.get_bentoml_config_file_from_env(),
            override_config_values=configuration.get_bentoml_override_config_from_env(),
            override_config_json=configuration.get_bentoml_override_config_json_from_env(),
            use_version=2,
        ).config
    found: dict[str, str] = {}
    settings = sorted(flat(config).items(), key=lambda item: ".runner_connection." in item[0])
    for name, value in settings:
        setting = name.removeprefix("services.")
        for section in (service, "runner_connection"):
            if name not in default:
                setting = setting.removeprefix(f"{section}.")
        if value != default.get(f"services.{setting}", default.get(name)):
            found.setdefault(setting, name)
    return found


def tracer_provider() -> TracerProvider:
    """Return BentoML's OpenTelemetry tracer provider, `BentoMLContainer.tracer_provider`.

    Its sampler and exporter are configured under `services.tracing` in BentoML's configuration. The
    provider is a singleton that BentoML creates at the first use.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    provider: TracerProvider = BentoMLContainer.tracer_provider.get()
    return provider


def set_launcher_hangup_action(*, stop: bool) -> None:
    """Set what BentoML's launcher does on SIGHUP; call it before the launcher starts its workers.

    Replaces `circus.sighandler.SysHandler.handle_hup`, which would restart the workers. A restart
    fails, because stopped workers have shut down the listening socket that all workers share.
    Blocking SIGHUP with a signal mask fails too, because a thread of numpy that started earlier
    would receive the signal.

    Args:
        stop: Whether SIGHUP stops the launcher as SIGTERM does. False: SIGHUP is ignored.
    """
    from circus.sighandler import SysHandler  # type: ignore[import-untyped]

    action: Callable[[Any], None] = SysHandler.handle_term if stop else lambda _: None
    SysHandler.handle_hup = action


def running_uvicorn_server() -> uvicorn.Server | None:
    """Return the uvicorn server that runs in this process, or None.

    uvicorn installs the bound method `uvicorn.Server.handle_exit` as handler of SIGTERM. The server
    is found through this handler, because an ASGI app has no reference to its server.
    `GracefulShutdown` also reads the server's attributes `started` and `servers`, and calls
    `handle_exit`.
    """
    import uvicorn

    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None


def use_protocol(
    server: uvicorn.Server,
    limits: ConnectionLimits,
    backlog: int,
    context: ssl.SSLContext | None = None,
) -> None:
    """Make a uvicorn server, which does not listen yet, use `LimitedHttpProtocol`.

    BentoML's worker builds the `uvicorn.Config` and leaves no room for a protocol class. The server
    reads `config.http_protocol_class` for each connection, and `config.ssl` and `config.backlog`
    when it begins to listen, after the ASGI lifespan has started. With TLS, `TlsHandshake` takes
    the place of uvicorn's `ssl` argument, so that the limits hold during handshakes too.

    Args:
        server: A server whose ASGI lifespan is starting.
        limits: The table of connections.
        backlog: Largest length of the kernel's queue of connections.
        context: The context for TLS. None: that of BentoML's own options, if it has one.
    """
    from serving.server.http_protocol import LimitedHttpProtocol
    from serving.server.tls import TlsHandshake

    config = server.config
    context, config.ssl = context or config.ssl, None
    create: Any = partial(LimitedHttpProtocol, limits)
    if context is not None:
        create = partial(TlsHandshake, limits, context)
    config.http_protocol_class = create
    config.backlog = min(config.backlog, backlog)


def listening_addresses(server: uvicorn.Server) -> list[str]:
    """Return the IP addresses that a uvicorn server listens on; none for a Unix socket."""
    names = [one.getsockname() for each in server.servers for one in each.sockets]
    return [name[0] for name in names if isinstance(name, tuple)]
