"""compose.yaml: it is valid, and starts two replicas of the service with its limits."""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.container_engine import DOCKER, IMAGE, ROOT, run, skip_or_fail

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("build_seconds")]

PASSWORD = {"GRAFANA_PASSWORD": "of-this-test"}
CONFIG = yaml.safe_load((ROOT / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def compose_command(build_seconds: float) -> list[str]:
    if run(DOCKER, "compose", "version", check=False).returncode == 0:
        return [DOCKER, "compose"]
    skip_or_fail(
        "" if shutil.which("docker-compose") else "neither docker compose nor docker-compose"
    )
    return ["docker-compose"]


@pytest.fixture(scope="module")
def replicas(
    compose_command: list[str], bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """The names of the two containers, healthy."""
    project = f"fledgetest{uuid.uuid4().hex[:8]}"
    env = {"FLEDGE_IMAGE": IMAGE, "FLEDGE_BUNDLE_DIR": str(bundle), **PASSWORD}
    often = tmp_path_factory.mktemp("compose") / "often.yaml"
    often.write_text(yaml.safe_dump({"services": {"fledge": {"healthcheck": {"interval": "1s"}}}}))
    compose = (*compose_command, "--project-name", project, "--project-directory", str(ROOT))
    compose += ("--file", str(ROOT / "compose.yaml"), "--file", str(often))
    run(*compose, "up", "--detach", "fledge", env=env, limit=120)
    try:
        names = run(*compose, "ps", "--quiet", "fledge", env=env).stdout.split()
        for name in names:
            wait_until_healthy(name)
        yield names
    finally:
        run(*compose, "down", "--volumes", "--timeout", "5", env=env, limit=120)


def inspect(name: str) -> dict:
    return json.loads(run(DOCKER, "inspect", name).stdout)[0]


def wait_until_healthy(name: str, limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while (state := inspect(name)["State"])["Health"]["Status"] != "healthy":
        assert time.monotonic() < deadline, state
        time.sleep(0.5)


def test_compose_accepts_the_file(compose_command: list[str]) -> None:
    config = yaml.safe_load(run(*compose_command, "config", env=PASSWORD).stdout)
    assert set(config["services"]) == {"fledge", "nginx", "prometheus", "grafana"}
    environment = config["services"]["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD"] == "of-this-test"


@pytest.mark.parametrize("env", [{}, {"GRAFANA_PASSWORD": ""}])
def test_compose_requires_a_password_for_grafana(
    compose_command: list[str], env: dict[str, str]
) -> None:
    refused = run(*compose_command, "config", env=env, check=False)
    assert refused.returncode != 0
    assert "GRAFANA_PASSWORD" in refused.stderr


@pytest.mark.parametrize("name", CONFIG["services"])
def test_every_service_has_limits_and_a_restart_policy(name: str) -> None:
    service = CONFIG["services"][name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["restart"] == "unless-stopped"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    default = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", service["image"])
    assert default == "fledge" or re.search(r":v?\d+\.\d+", default), "pin the version"
    for volume in service["volumes"]:
        source = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", volume).split(":")[0]
        if source.startswith("./deploy"):
            assert (ROOT / source).is_file()


def test_two_replicas_have_the_stated_limits(replicas: list[str]) -> None:
    assert len(replicas) == 2
    limits = CONFIG["services"]["fledge"]["deploy"]["resources"]["limits"]
    for name in replicas:
        host = inspect(name)["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert any("no-new-privileges" in option for option in host["SecurityOpt"])
        assert host["NanoCpus"] == float(limits["cpus"]) * 1e9
        assert f"{host['Memory'] / 2**30:.0f}G" == limits["memory"]


def test_a_killed_replica_is_restarted(replicas: list[str]) -> None:
    pids = run(DOCKER, "top", replicas[0], "-o", "pid,args").stdout.splitlines()
    (worker,) = [line.split()[0] for line in pids if "fledge serve" in line]
    run("kill", "-KILL", worker)
    deadline = time.monotonic() + 60
    while inspect(replicas[0])["RestartCount"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    wait_until_healthy(replicas[0])
