"""The Grafana dashboard queries only metrics of the service, and Prometheus answers all queries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml

from serving.errors import FledgeError
from serving.http.problems import HttpError
from tests.support.deploy_tools import find_program, output_of
from tests.support.live_server import NO_TLS, Live, free_port, get, live, post
from tests.support.tiny_bundle import photo, tiny_bundle
from tests.test_readme import below

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
AUTOSCALER = yaml.safe_load((DEPLOY / "k8s" / "autoscaler.yaml").read_text())
SCALED_BY = AUTOSCALER["spec"]["metrics"][0]["pods"]["metric"]["name"]


def filled(query: str) -> str:
    """The query with Grafana's variables replaced."""
    return query.replace("$__rate_interval", "5s").replace("$job", ".*")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Live]]:
    tmp_path = tmp_path_factory.mktemp("replicas")
    folder = tiny_bundle(tmp_path / "bundle")
    with ExitStack() as stack:
        yield [stack.enter_context(live(folder, tmp_path / f"log-{i}")) for i in range(2)]


def test_every_queried_metric_is_served(replicas: list[Live]) -> None:
    post(f"{replicas[0].url}/predict", photo(1))
    text = get(f"{replicas[0].url}/metrics").text
    served = set(re.findall(r"^(\w+)(?:{| )", text, re.M))
    queried = {name for query in QUERIES.values() for name in re.findall(r"fledge_\w+", query)}
    assert len(queried) > 8
    assert queried - served == set()
    assert SCALED_BY in served
    alerting = {name for rule in ALERTS for name in re.findall(r"fledge_\w+", rule["expr"])}
    assert alerting == {
        "fledge_overdue",
        "fledge_connections_refused_total",
        "fledge_log_dropped_total",
        "fledge_bundles_refused_total",
    }
    # A counter with labels has no value before it counts something.
    assert alerting - set(re.findall(r"^# TYPE (\w+) ", text, re.M)) == set()


def test_queried_outcomes_are_codes_of_the_service() -> None:
    kinds = {kind for root in (FledgeError, HttpError) for kind in below(root)} - {HttpError}
    codes = {kind.code for kind in kinds} | {"internal"}
    queried = {
        code
        for query in QUERIES.values()
        for codes_of_one in re.findall(r'outcome=~"([^"]+)"', query)
        for code in codes_of_one.split("|")
    }
    assert len(queried) > 8
    assert queried - codes == set()


def test_panels_have_names_and_do_not_overlap() -> None:
    occupied: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["description"]
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert grid["x"] + grid["w"] <= 24
        assert not cells & occupied
        occupied |= cells


def test_prometheus_answers_every_query(replicas: list[Live], tmp_path: Path) -> None:
    """With the configuration of compose.yaml, except targets and intervals."""
    prometheus = find_program("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job.pop("dns_sd_configs") == [
        {"names": ["fledge"], "type": "A", "port": 3000, "refresh_interval": "10s"}
    ]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{one.port}" for one in replicas]}]
    config["global"]["scrape_interval"] = "250ms"
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    port = free_port()
    command = [prometheus, f"--config.file={tmp_path}/prometheus.yml"]
    command += [f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        unanswered = dict(QUERIES)
        deadline = time.monotonic() + 60
        while unanswered and time.monotonic() < deadline:
            for one in replicas:
                post(f"{one.url}/predict", photo(1))
                post(f"{one.url}/predict", b"no image")
            time.sleep(0.2)
            for name, query in list(unanswered.items()):
                if answer(port, filled(query)):
                    del unanswered[name]
        assert unanswered == {}, (tmp_path / "log").read_text()[-2000:]
        rules = get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert [rule["name"] for rule in rules] == [rule["alert"] for rule in ALERTS]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}  # unknown: not yet evaluated
    finally:
        server.terminate()
        server.wait(30)


def answer(port: int, query: str) -> list[dict]:
    """The values of the result that are numbers."""
    try:
        response = httpx.get(
            f"http://127.0.0.1:{port}/api/v1/query",
            params={"query": query},
            trust_env=False,
            verify=NO_TLS,
        )
    except httpx.TransportError:  # not up yet
        return []
    if response.status_code == 503:
        return []
    assert response.status_code == 200, f"{query}: {response.text}"
    return [one for one in response.json()["data"]["result"] if one["value"][1] != "NaN"]


def test_promtool_accepts_the_configuration() -> None:
    output = output_of(find_program("promtool"), "check", "config", f"{DEPLOY}/prometheus.yml")
    assert f"SUCCESS: {len(ALERTS)} rules found" in output
