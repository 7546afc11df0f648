"""`make sbom` lists exactly the packages of the image."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.container_engine import Container, make

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_sbom_lists_the_packages_of_the_image(container: Container) -> None:
    make("sbom", limit=300)
    sbom = json.loads((ROOT / "build" / "sbom.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["name"] == "fledge"
    listed = {normalized(one["name"]): one["version"] for one in sbom["components"]}
    code = """
import importlib.metadata as m, json
print(json.dumps([(d.metadata["Name"], d.version) for d in m.distributions()]))
"""
    inside = {normalized(name): version for name, version in json.loads(container.python(code))}
    assert len(inside) > 50
    assert listed == inside
    assert all(one["purl"].startswith("pkg:pypi/") for one in sbom["components"])
    assert sum("licenses" in one for one in sbom["components"]) > 0.9 * len(listed)
