"""Settings of BentoML are in effect on the model's routes, or the start is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.errors import OptionError
from serving.server import bentoml_config
from tests.support.live_server import ROOT, free_port, launch
from tests.support.tiny_bundle import tiny_bundle

# BentoML's own imports use deprecated parts of other packages.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def refused(folder: Path, log: Path, **env: str) -> str:
    assert launch(folder, free_port(), log, **env).wait(60) == 2
    output = log.read_text()
    assert output.count("\n") == 1
    assert "http" not in output.replace("services.http", "")  # no address before
    return output


SETTINGS = {
    "services.ssl.enabled=true": "FLEDGE_TLS_CERT and FLEDGE_TLS_KEY",
    "services.image_classifier.ssl.certfile=/c.pem": "FLEDGE_TLS_CERT and FLEDGE_TLS_KEY",
    "services.http.cors.enabled=true": "FLEDGE_CORS_ORIGINS",
    "services.http.cors.access_control_allow_origins=https://a": "FLEDGE_CORS_ORIGINS",
    "services.http.port=4000": "--port",
    "services.traffic.timeout=5": "FLEDGE_DEADLINE",
    "services.traffic.max_concurrency=3": "FLEDGE_MAX_QUEUE",
    "services.workers=2": "FLEDGE_WORKERS",
    "services.image_classifier.workers=2": "FLEDGE_WORKERS",
    "services.threads=2": "FLEDGE_WORKERS",
    "services.backlog=100": "FLEDGE_MAX_CONNECTIONS",
    "services.logging.access.enabled=false": "remove it",
    "services.metrics.namespace=x": "remove it",
    "services.runner_connection.max_requests=3": "remove it",
    "api_server.workers=2": "remove it",
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch):
    """Judge BENTOML_CONFIG_OPTIONS in a process that has loaded BentoML already."""
    import bentoml._internal.configuration.containers  # noqa: F401

    def judge(options: str, *, bentoml_serve: bool = False) -> str:
        monkeypatch.setenv("BENTOML_CONFIG_OPTIONS", options)
        try:
            bentoml_config.check(os.environ, bentoml_serve=bentoml_serve)
        except OptionError as error:
            return str(error)
        return ""

    return judge


@pytest.mark.parametrize("options", SETTINGS)
def test_a_setting_without_effect_is_refused_with_ours(settings, options: str):
    name = options.partition("=")[0]
    message = settings(options)
    assert message.startswith(f"BENTOML_CONFIG_OPTIONS: {name} has no effect on the model's routes")
    assert message.endswith(SETTINGS[options])
    assert message.count("has no effect") == 1
    assert "\n" not in message


def test_all_settings_are_named_at_once(settings):
    message = settings("services.workers=2 services.traffic.timeout=5")
    assert "FLEDGE_WORKERS" in message
    assert "FLEDGE_DEADLINE" in message


@pytest.mark.parametrize(
    "options",
    [
        "",
        "services.traffic.timeout=60",  # the default
        "services.tracing.sample_rate=0.5 services.tracing.exporter_type=otlp",
        "services.image_classifier.tracing.excluded_urls=/model",
    ],
)
def test_settings_in_effect_are_accepted(settings, options: str):
    assert settings(options) == ""


def test_bentoml_serve_has_an_address_and_tls_of_its_own(settings):
    options = "services.http.port=4000 services.ssl.enabled=true services.ssl.certfile=/c.pem"
    assert settings(options, bentoml_serve=True) == ""
    assert "FLEDGE_WORKERS" in settings(f"{options} services.workers=2", bentoml_serve=True)


def test_fledge_serve_refuses_before_it_tells_the_address(folder: Path, tmp_path: Path):
    output = refused(folder, tmp_path / "log", BENTOML_CONFIG_OPTIONS="services.workers=2")
    assert "FLEDGE_WORKERS" in output


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "services: {traffic: {timeout: 5}}"),
        ("config.yaml", "services: [1"),
        ("config.yaml", "- 1"),
        ("config.yaml", "version: 2\nservices: {}"),
        ("config.yaml", "services: {workers: many}"),
        ("config.txt", "services: {}"),
    ],
)
def test_a_broken_or_unused_file_is_one_line(folder: Path, tmp_path: Path, name: str, text: str):
    config = tmp_path / name
    config.write_text(text)
    assert "BENTOML_CONFIG: " in refused(folder, tmp_path / "log", BENTOML_CONFIG=str(config))


def test_a_missing_file_is_one_line(folder: Path, tmp_path: Path):
    missing = str(tmp_path / "missing.yaml")
    assert missing in refused(folder, tmp_path / "log", BENTOML_CONFIG=missing)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("BENTOML_CONFIG_OPTIONS", "garbage"), ("BENTOML_CONFIG_OVERRIDES", "{")],
)
def test_broken_options_are_one_line(folder: Path, tmp_path: Path, variable: str, value: str):
    assert f"{variable}: " in refused(folder, tmp_path / "log", **{variable: value})


def test_bentoml_serve_refuses_settings_without_effect(folder: Path, tmp_path: Path):
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:ImageClassifier"]
    done = subprocess.run(
        [*command, "--port", str(free_port()), "--working-dir", str(ROOT)],
        cwd=ROOT,
        env={
            **os.environ,
            "FLEDGE_BUNDLE": str(folder),
            "BENTOML_HOME": str(tmp_path / "home"),
            "BENTOML_CONFIG_OPTIONS": "services.traffic.timeout=5",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "fledge: BENTOML_CONFIG_OPTIONS: services.traffic.timeout has no effect" in done.stderr
    assert "use FLEDGE_DEADLINE" in done.stderr


def test_without_settings_bentoml_is_not_imported():
    code = (
        "import sys; from serving.server.bentoml_config import check\n"
        "check({}, bentoml_serve=False); print('bentoml' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
