"""Adapter for the private parts of BentoML, circus and uvicorn that Fledge uses.

Every use of such a part is in this file, one function or constant each. A release may change any of
them without notice: `CHECKED_VERSIONS` names the releases on which they were checked, and after an
upgrade `tests/serving/server/test_bentoml_compat.py` is the first test to fail.

The functions import these packages when called: BentoML takes seconds to import, and `fledge serve`
checks the bundle and the port before it needs BentoML.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import uvicorn
    from opentelemetry.sdk.trace import TracerProvider

CHECKED_VERSIONS: Final = {"bentoml": "1.4.39", "kantoku": "0.18.3", "uvicorn": "0.54.0"}
"""Distribution -> release. The package `circus` comes from the distribution `kantoku`."""

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
    """Base class for the option `service_class` of `bentoml.service`, which is not documented.

    `_bentoml_sdk.Service`: `to_asgi(is_main)` builds the ASGI app of a worker, and a call of the
    service creates the instance of the decorated class.
    """
    from _bentoml_sdk import Service  # type: ignore[import-untyped]

    return Service


def run_worker(arguments: Sequence[str]) -> None:
    """Run a BentoML worker in this process, without the launcher.

    `_bentoml_impl.worker.service.main`: the click command that the launcher starts as a child.
    """
    from _bentoml_impl.worker.service import main  # type: ignore[import-untyped]

    main(list(arguments), standalone_mode=False)


def keep_metrics_in_memory() -> None:
    """Make `/metrics` report only this process; call it before the worker starts.

    `BentoMLContainer.metrics_client` and `PrometheusClient(multiproc=False)`: by default BentoML
    keeps the metrics of all workers in files of `PROMETHEUS_MULTIPROC_DIR`.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.server.metrics.prometheus import PrometheusClient

    BentoMLContainer.metrics_client.set(PrometheusClient(multiproc=False))


def tracing_sample_rate() -> float:
    """Share of the requests to trace, 0 to 1; 0 if tracing is off.

    `BentoMLContainer.tracing.sample_rate`: BentoML's own configuration, `services.tracing`.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    rate: float | None = BentoMLContainer.tracing.sample_rate.get()
    return rate or 0.0


def tracer_provider() -> TracerProvider:
    """BentoML's provider, with the sampler and the exporter of `services.tracing`.

    `BentoMLContainer.tracer_provider`: a singleton that is created at its first use.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    provider: TracerProvider = BentoMLContainer.tracer_provider.get()
    return provider


def set_launcher_hangup_action(*, stop: bool) -> None:
    """Make the launcher stop on SIGHUP as on SIGTERM, or ignore SIGHUP; call it before the start.

    `circus.sighandler.SysHandler.handle_hup`: circus would restart the workers, but the stopped
    workers have shut down the listening socket that all workers share. SIGHUP can't be blocked by a
    signal mask instead, because a thread of numpy that started earlier would receive it.
    """
    from circus.sighandler import SysHandler  # type: ignore[import-untyped]

    action: Callable[[Any], None] = SysHandler.handle_term if stop else lambda _: None
    SysHandler.handle_hup = action


def running_uvicorn_server() -> uvicorn.Server | None:
    """The server that handles SIGTERM in this process, or None.

    `uvicorn.Server.handle_exit`: uvicorn installs this bound method as the signal handler. An app
    has no other reference to its server. `GracefulShutdown` also reads the server's attributes
    `started` and `servers`, and calls `handle_exit`.
    """
    import uvicorn

    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None
