"""compose.yaml publishes nothing beyond this machine unless it is told to."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

SERVICES = yaml.safe_load((Path(__file__).parents[2] / "compose.yaml").read_text())["services"]


def published(env: dict[str, str]) -> dict[str, list[str]]:
    """The ports of each service, with the variables of the file replaced."""

    def value(found: re.Match[str]) -> str:
        return env.get(found[1], found[2])

    return {
        name: [re.sub(r"\$\{(\w+):-([^}]*)\}", value, port) for port in service.get("ports", ())]
        for name, service in SERVICES.items()
    }


def test_every_port_is_of_this_machine_alone_by_default() -> None:
    ports = [port for found in published({}).values() for port in found]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_an_address_and_a_port_can_be_named() -> None:
    env = {"FLEDGE_ADDRESS": "0.0.0.0", "FLEDGE_PORT": "80"}
    assert published(env)["nginx"] == ["0.0.0.0:80:8080"]
