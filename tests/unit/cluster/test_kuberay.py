"""cluster/kuberay/ matches the CRDs of KubeRay (schemas/kuberay.json), needs a token and no privileges, and shares the
store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from reduced_schemas import FOLDER, errors

FILES = Path(__file__).parents[3] / "cluster" / "kuberay"
OBJECT_META = {"name", "namespace", "labels", "annotations"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FILES / name).read_text(encoding="utf-8"))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> Iterator[dict[str, Any]]:
    """Yield the PodSpecs of head and workers."""
    spec = cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


each_manifest = pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])


@each_manifest
def test_manifest_matches_the_crd(name: str) -> None:
    manifest = read(name)
    assert errors("kuberay", manifest["kind"], manifest) == []
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(manifest["metadata"]) <= OBJECT_META


def misspelt(manifest: dict[str, Any]) -> None:
    manifest["spec"]["enableInTreeAutoScaling"] = True


def misspelt_in_a_container(manifest: dict[str, Any]) -> None:
    spec = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    spec["containers"][0]["securityContext"]["allowPrivilegeEscalations"] = False


def unknown_mode(manifest: dict[str, Any]) -> None:
    manifest["spec"]["authOptions"]["mode"] = "tokens"


def number_for_a_text(manifest: dict[str, Any]) -> None:
    manifest["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def missing_key(manifest: dict[str, Any]) -> None:
    del manifest["spec"]["headGroupSpec"]["template"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (misspelt, "'enableInTreeAutoScaling' was unexpected"),
        (misspelt_in_a_container, "'allowPrivilegeEscalations' was unexpected"),
        (unknown_mode, "'tokens' is not one of"),
        (number_for_a_text, "0 is not of type 'string'"),
        (missing_key, "'template' is a required property"),
    ],
)
def test_wrong_manifest_is_rejected(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    manifest = read("raycluster.yaml")
    edit(manifest)
    found = errors("kuberay", "RayCluster", manifest)
    assert found  # an alias of YAML may occur several times
    assert all(message in error for error in found)


def test_claim_matches_the_schema_of_claims_in_pods() -> None:
    claim = read("store.yaml")
    template = {"volumes": [{"name": "x", "ephemeral": {"volumeClaimTemplate": {"spec": claim["spec"]}}}]}
    manifest = read("raycluster.yaml")
    manifest["spec"]["headGroupSpec"]["template"]["spec"] |= template
    assert errors("kuberay", "RayCluster", manifest) == []
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert set(claim["metadata"]) <= OBJECT_META


@each_manifest
def test_cluster_requires_a_token_and_has_the_version_of_ray_that_tunery_has(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["rayVersion"] == version("ray")
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False


@each_manifest
def test_pods_run_without_privileges(name: str) -> None:
    submitter = read(name)["spec"].get("submitterPodTemplate")
    for spec in (*pods(name), *([submitter["spec"]] if submitter else [])):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


@each_manifest
def test_all_nodes_mount_the_claim_at_the_same_path_and_have_shared_memory(name: str) -> None:
    claim = read("store.yaml")["metadata"]["name"]
    for spec in pods(name):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        (container,) = spec["containers"]
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounted["/shared"]["persistentVolumeClaim"]["claimName"] == claim
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"


@each_manifest
def test_gpu_workers_start_on_demand(name: str) -> None:
    spec = cluster_spec(name)
    (group,) = spec["workerGroupSpecs"]
    assert spec["enableInTreeAutoscaling"] is True
    assert group["minReplicas"] == 0 < group["maxReplicas"]


def test_job_is_retried_and_requests_workers_that_the_cluster_can_have() -> None:
    spec = read("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    words = spec["entrypoint"].split()
    assert words[words.index("--") + 1 :][:2] == ["tunery", "run"]
    assert not set("|&;<>()$`\"'") & set(spec["entrypoint"]), "the shell of the submitter would interpret it"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert int(words[words.index("--gpus") + 1]) <= gpus * group["maxReplicas"]


def test_schema_records_its_origin() -> None:
    origin = json.loads((FOLDER / "kuberay.json").read_text())["$comment"]
    assert origin["license"] == "Apache-2.0"
    assert f"KubeRay {origin['version'].rpartition('.')[0]}" in (FILES / "rayjob.yaml").read_text()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 150_000
