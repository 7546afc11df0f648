"""The manifests of deploy/k8s: valid by Kubernetes' schemas, and consistent with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serving.bundle import storage
from serving.server.launch import GRACE_SECONDS
from serving.server.memory_needs import memory_needs
from serving.settings import Settings
from tests.support.tiny_bundle import tiny_bundle

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "k8s"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
# The oldest release in which all these kinds are stable, and the newest known one.
VERSIONS = ("1.25.0", kubernetes_validate.latest_version())


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (m for m in map(load, FILES) if m["kind"] == kind)
    return found


def load(path: Path) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(path.read_text())
    return document


POD = manifest("Deployment")["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path, version: str) -> None:
    kubernetes_validate.validate(load(path), version, strict=True)


def test_the_validator_finds_a_misspelt_field() -> None:
    wrong = load(FOLDER / "deployment.yaml")
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_every_kind_exists_and_is_applied() -> None:
    kinds = {load(path)["kind"] for path in FILES}
    wanted = {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    assert kinds == wanted | {"NetworkPolicy"}
    assert sorted(KUSTOMIZATION["resources"]) == [path.name for path in FILES]
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == CONTAINER["image"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", image["newTag"])


def test_all_selectors_match_the_pods_of_the_deployment() -> None:
    labels = POD["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("Service")["spec"]["selector"].items() <= labels.items()
    policy = manifest("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    budget = manifest("PodDisruptionBudget")["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    scaler = manifest("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    assert budget["minAvailable"] < scaler["minReplicas"]  # otherwise no node could be drained


def test_the_pod_has_no_privileges_and_a_read_only_root() -> None:
    pod, own = POD["spec"]["securityContext"], CONTAINER["securityContext"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {pod['runAsUser']}:{pod['runAsGroup']}" in dockerfile
    assert pod["runAsNonRoot"]
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["readOnlyRootFilesystem"]
    assert not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert POD["spec"]["automountServiceAccountToken"] is False
    (mount,) = CONTAINER["volumeMounts"]  # for the scratch files of the service
    assert mount["mountPath"] == "/tmp"
    assert "emptyDir" in POD["spec"]["volumes"][0]


def test_probes_use_served_paths_and_the_grace_period_covers_the_shutdown() -> None:
    probes = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert [probe["httpGet"]["path"] for probe in probes.values()] == [
        "/readyz",
        "/readyz",
        "/livez",
    ]
    (port,) = CONTAINER["ports"]
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["name"]}
    assert f"EXPOSE {port['containerPort']}" in (ROOT / "Dockerfile").read_text()
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert POD["spec"]["terminationGracePeriodSeconds"] >= pause + GRACE_SECONDS


def test_resources_have_requests_and_limits() -> None:
    for kind in ("requests", "limits"):
        assert set(CONTAINER["resources"][kind]) == {"cpu", "memory"}


def test_the_memory_is_guaranteed_and_enough_for_the_defaults(tmp_path: Path) -> None:
    """Of Kubernetes and compose.yaml: with a network of 14 MB half of it is left for requests."""
    resources = CONTAINER["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == "1Gi"
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["fledge"]
    assert service["deploy"]["resources"]["limits"]["memory"] == "1G"
    manifest = storage.read(tiny_bundle(tmp_path, size=224)).manifest
    (graph,) = manifest.graphs
    files = {**manifest.files, graph: {**manifest.files[graph], "bytes": 14_000_000}}
    manifest = manifest.model_copy(update={"files": files})
    needs = memory_needs(Settings(tmp_path), manifest, 2**30)
    assert needs.total <= 2**30
    assert needs.requests > 400 * 2**20
    (volume,) = POD["spec"]["volumes"]  # in memory, which counts
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Mi"}
    assert needs.margin >= 64 * 2**20
    assert service["tmpfs"] == "/tmp:size=64m"


def test_only_the_proxy_and_prometheus_reach_the_pods_which_reach_nothing() -> None:
    policy = manifest("NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    names = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for peer in rule["from"]
    ]
    assert names == ["ingress-nginx", "monitoring"]
    assert [port["port"] for port in rule["ports"]] == [CONTAINER["ports"][0]["name"]]
