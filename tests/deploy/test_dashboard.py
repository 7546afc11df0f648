"""The Grafana dashboard asks only for what the service tells, and gets answers from Prometheus."""

from __future__ import annotations

import json
import re
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
from tests.support.deploy_tools import program, said
from tests.support.live_server import Live, free_port, get, live, post
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
AUTOSCALER = yaml.safe_load((DEPLOY / "k8s" / "autoscaler.yaml").read_text())
SCALED_BY = AUTOSCALER["spec"]["metrics"][0]["pods"]["metric"]["name"]


def filled(query: str) -> str:
    """With Grafana's variables filled in."""
    return query.replace("$__rate_interval", "10s").replace("$job", ".*")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Live]]:
    tmp_path = tmp_path_factory.mktemp("replicas")
    folder = tiny_bundle(tmp_path / "bundle")
    with ExitStack() as stack:
        yield [stack.enter_context(live(folder, tmp_path / f"log-{i}")) for i in range(2)]


def test_every_metric_asked_for_is_served(replicas: list[Live]) -> None:
    post(f"{replicas[0].url}/predict", photo(1))
    served = set(re.findall(r"^(\w+)(?:{| )", get(f"{replicas[0].url}/metrics").text, re.M))
    asked = {name for query in QUERIES.values() for name in re.findall(r"fledge_\w+", query)}
    assert len(asked) > 8
    assert asked - served == set()
    assert SCALED_BY in served


def test_outcomes_asked_for_are_codes_of_the_service() -> None:
    kinds = {kind for root in (FledgeError, HttpError) for kind in below(root)} - {HttpError}
    codes = {kind.code for kind in kinds} | {"internal"}
    asked = {
        code
        for query in QUERIES.values()
        for codes_of_one in re.findall(r'outcome=~"([^"]+)"', query)
        for code in codes_of_one.split("|")
    }
    assert len(asked) > 8
    assert asked - codes == set()


def test_panels_have_names_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_prometheus_has_an_answer_to_every_query(replicas: list[Live], tmp_path: Path) -> None:
    """compose.yaml has the same configuration, but for places and times."""
    prometheus = program("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job.pop("dns_sd_configs") == [
        {"names": ["fledge"], "type": "A", "port": 3000, "refresh_interval": "10s"}
    ]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{one.port}" for one in replicas]}]
    config["global"]["scrape_interval"] = "1s"
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [prometheus, f"--config.file={tmp_path}/prometheus.yml"]
    command += [f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        unanswered = dict(QUERIES)
        until = time.monotonic() + 60
        while unanswered and time.monotonic() < until:
            for one in replicas:
                post(f"{one.url}/predict", photo(1))
                post(f"{one.url}/predict", b"no image")
            time.sleep(0.5)
            for name, query in list(unanswered.items()):
                if answer(port, filled(query)):
                    del unanswered[name]
        assert unanswered == {}, (tmp_path / "log").read_text()[-2000:]
    finally:
        server.terminate()
        server.wait(30)


def answer(port: int, query: str) -> list[dict]:
    """The values that are numbers."""
    try:
        told = httpx.get(
            f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, trust_env=False
        )
    except httpx.TransportError:  # not up yet
        return []
    if told.status_code == 503:
        return []
    assert told.status_code == 200, f"{query}: {told.text}"
    return [one for one in told.json()["data"]["result"] if one["value"][1] != "NaN"]


def test_promtool_finds_no_fault_with_the_configuration() -> None:
    assert "SUCCESS" in said(program("promtool"), "check", "config", f"{DEPLOY}/prometheus.yml")
