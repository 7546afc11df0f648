"""The private parts of BentoML, circus and uvicorn are as `bentoml_compat` expects them.

After an upgrade this file fails first. Check each part of `bentoml_compat` against the new release,
then change `CHECKED_VERSIONS`.
"""

import importlib.metadata
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import bentoml
import click
import pytest
import uvicorn
from opentelemetry.sdk.trace import TracerProvider

from serving.server import bentoml_compat

# BentoML's own imports use deprecated parts of other packages.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[3]


def test_installed_versions_are_those_that_were_checked():
    installed = {name: importlib.metadata.version(name) for name in bentoml_compat.CHECKED_VERSIONS}
    assert installed == bentoml_compat.CHECKED_VERSIONS


def test_circus_comes_from_the_distribution_that_is_checked():
    assert importlib.metadata.packages_distributions()["circus"] == ["kantoku"]


def test_the_launcher_starts_workers_by_this_module():
    from _bentoml_impl.server import serving

    assert serving._SERVICE_WORKER_SCRIPT == bentoml_compat.WORKER_MODULE
    source = inspect.getsource(serving)
    assert source.count('"-m",') == source.count("_SERVICE_WORKER_SCRIPT,") > 0


def test_the_worker_is_a_click_command_with_these_options():
    from _bentoml_impl.worker.service import main

    assert isinstance(main, click.Command)
    options = {option for parameter in main.params for option in parameter.opts}
    assert {"bento_identifier", "--fd", "--worker-id", "--timeout-graceful-shutdown"} <= options


def test_a_service_class_is_accepted_and_makes_app_and_instance():
    service = bentoml_compat.service_class()
    parameter = inspect.signature(bentoml.service).parameters["service_class"]
    assert parameter.default is service
    assert list(inspect.signature(service.to_asgi).parameters) == ["self", "is_main"]
    assert list(inspect.signature(service.__call__).parameters) == ["self"]

    class Own(service):
        pass

    @bentoml.service(name="own", service_class=Own)
    class Example:
        pass

    assert isinstance(Example, Own)
    assert isinstance(Example(), Example.inner)


def test_bentoml_answers_these_routes():
    @bentoml.service(name="routes")
    class Example:
        pass

    paths = {getattr(route, "path", None) for route in Example.to_asgi().routes}
    served = {*bentoml_compat.ROUTES, bentoml_compat.OPENAPI_PAGE, "/static_content"}
    assert served <= paths


def test_bentoml_has_these_static_files():
    from bentoml._internal import server

    folder = Path(server.__file__).parent / "static_content"
    files = {f"/static_content/{path.name}" for path in folder.iterdir()}
    assert files == bentoml_compat.STATIC_FILES


def test_metrics_can_be_kept_in_memory():
    code = (
        "from serving.server.bentoml_compat import keep_metrics_in_memory\n"
        "keep_metrics_in_memory()\n"
        "from bentoml._internal.configuration.containers import BentoMLContainer\n"
        "client = BentoMLContainer.metrics_client.get()\n"
        "print(client.multiproc, client.registry is client.prometheus_client.REGISTRY)\n"
    )
    environ = {name: v for name, v in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True"]


def test_tracing_is_off_by_default_and_has_a_provider():
    assert bentoml_compat.tracing_sample_rate() == 0
    provider = bentoml_compat.tracer_provider()
    assert isinstance(provider, TracerProvider)
    assert provider is bentoml_compat.tracer_provider()


@pytest.mark.parametrize("stop", [True, False])
def test_circus_calls_the_handler_of_sighup(stop: bool, monkeypatch: pytest.MonkeyPatch):
    from circus.sighandler import SysHandler

    assert signal.SIGHUP in SysHandler.SIGNALS
    calls = []
    monkeypatch.setattr(SysHandler, "_register", lambda self: None)
    monkeypatch.setattr(SysHandler, "quit", lambda self: calls.append("quit"))
    monkeypatch.setattr(SysHandler, "reload", lambda self: calls.append("reload"))
    monkeypatch.setattr(SysHandler, "handle_hup", SysHandler.handle_hup)
    handler = SysHandler(None)
    handler.signal(signal.SIGHUP)
    assert calls == ["reload"]  # why it is replaced
    bentoml_compat.set_launcher_hangup_action(stop=stop)
    handler.signal(signal.SIGHUP)
    assert calls == (["reload", "quit"] if stop else ["reload"])


def test_uvicorns_server_is_found_by_its_signal_handler():
    async def app(scope, receive, send) -> None: ...

    assert bentoml_compat.running_uvicorn_server() is None
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    before = signal.getsignal(signal.SIGTERM)
    with server.capture_signals():
        assert bentoml_compat.running_uvicorn_server() is server
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(inspect.signature(server.handle_exit).parameters) == ["sig", "frame"]
    assert server.started is False
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit
    assert not server.force_exit


def test_uvicorn_lists_the_servers_with_their_sockets():
    source = inspect.getsource(uvicorn.Server)
    assert "self.servers.append(server)" in source
    assert "self.started = True" in source


def test_importing_the_adapter_imports_no_framework():
    code = (
        "import sys, serving.server.bentoml_compat\n"
        "heavy = {'bentoml', '_bentoml_sdk', 'circus', 'uvicorn', 'opentelemetry'}\n"
        "print(*heavy & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_uvicorn_reads_protocol_tls_and_backlog_after_the_lifespan_has_started():
    source = inspect.getsource(uvicorn.Server.startup)
    lifespan = source.index("await self.lifespan.startup()")
    for part in ("config.http_protocol_class(", "ssl=config.ssl", "backlog=config.backlog"):
        assert source.index(part) > lifespan
    assert "config=config" in source
    assert "server_state=self.server_state" in source


def test_the_protocol_has_what_the_limits_build_on():
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

    from serving.server.http_protocol import LimitedHttpProtocol

    base = vars(HttpToolsProtocol)
    own = ("drop", "check", "on_chunk_header")  # the last is called by httptools
    for name, member in vars(LimitedHttpProtocol).items():
        if callable(member) and not name.startswith("_") and name not in own:
            assert name in base, name
    assert {"_unset_keepalive_if_required", "_start_asgi_task"} < set(base)
    assert STATUS_LINE[431].startswith(b"HTTP/1.1 431 ")


def test_the_users_configuration_is_compared_with_the_defaults(monkeypatch: pytest.MonkeyPatch):
    for name in ("BENTOML_CONFIG", "BENTOML_CONFIG_OPTIONS", "BENTOML_CONFIG_OVERRIDES"):
        monkeypatch.delenv(name, raising=False)
    assert bentoml_compat.user_configuration("x") == {}
    monkeypatch.setenv("BENTOML_CONFIG_OVERRIDES", '{"services": {"workers": 3}}')
    assert bentoml_compat.user_configuration("x") == {"workers": "services.workers"}
    monkeypatch.setenv("BENTOML_CONFIG_OVERRIDES", '{"services": {"x": {"workers": 3}}}')
    assert bentoml_compat.user_configuration("x") == {"workers": "services.x.workers"}
    assert bentoml_compat.tracing_excluded_urls() == ""
