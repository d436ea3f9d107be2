"""The files of clusters are valid for Ray's launcher, Kubernetes and KubeRay, and require a token."""

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from firstlight.pipeline.config.load import load_recipe
from tests.support.paths import ROOT

CLOUDS = [ROOT / "cluster.yaml", ROOT / "conf/cluster/gcp.yaml"]
LAUNCHED = [*CLOUDS, ROOT / "conf/cluster/on_premises.yaml"]
KUBERNETES = ROOT / "conf/cluster/kubernetes.yaml"
TOKEN = "/home/ubuntu/.ray/auth_token"

# KubeRay's resource definitions of ray.io/v1: the fields of each kind of mapping with types. * marks required ones.
KINDS = {
    "cluster": "authOptions=auth autoscalerOptions=autoscaler enableInTreeAutoscaling=boolean "
    "gcsFaultToleranceOptions=object headGroupSpec*=head "
    "headServiceAnnotations=texts managedBy=string rayVersion=string suspend=boolean workerGroupSpecs=groups",
    "head": "enableIngress=boolean headService=object labels=texts rayStartParams=texts resources=texts "
    "serviceType=string template*=pod",
    "workers": "groupName*=string idleTimeoutSeconds=integer labels=texts maxReplicas*=integer "
    "minReplicas*=integer numOfHosts=integer "
    "rayStartParams=texts replicas=integer resources=texts scaleStrategy=object suspend=boolean template*=pod",
    "job": "activeDeadlineSeconds=integer backoffLimit=integer clusterSelector=texts deletionStrategy=object "
    "entrypoint=string "
    "entrypointNumCpus=number entrypointNumGpus=number entrypointResources=string jobId=string "
    "managedBy=string metadata=texts "
    "rayClusterSpec=cluster runtimeEnvYAML=string shutdownAfterJobFinishes=boolean submissionMode=string "
    "submitterConfig=object "
    "submitterPodTemplate=pod suspend=boolean ttlSecondsAfterFinished=integer",
    "autoscaler": "env=array envFrom=array idleTimeoutSeconds=integer image=string imagePullPolicy=string "
    "resources=object securityContext=object "
    "upscalingMode=upscaling version=string volumeMounts=array",
    "auth": "enableK8sTokenAuth=boolean mode=mode",
}
TYPES: dict[str, Any] = {
    **{kind: {"$ref": f"#/$defs/{kind}"} for kind in KINDS},
    "groups": {"type": "array", "items": {"$ref": "#/$defs/workers"}},
    "mode": {"enum": ["disabled", "token"]},
    "pod": {"type": "object"},  # Kubernetes' own schema checks it
    "texts": {"type": "object", "additionalProperties": {"type": "string"}},
    "upscaling": {"enum": ["Default", "Aggressive", "Conservative"]},
}


def _mapping(fields: str) -> dict[str, Any]:
    types = dict(field.split("=") for field in fields.split())
    properties = {key.rstrip("*"): TYPES.get(kind, {"type": kind}) for key, kind in types.items()}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": [key[:-1] for key in types if key.endswith("*")],
    }


def kuberay(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError for what KubeRay would refuse, or silently drop."""
    assert document["apiVersion"] == "ray.io/v1"
    kind = document["kind"].removeprefix("Ray").lower()
    jsonschema.validate(
        document["spec"],
        {"$ref": f"#/$defs/{kind}", "$defs": {name: _mapping(fields) for name, fields in KINDS.items()}},
    )


def launched(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return found


def manifests() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text("utf-8"))}


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_rays_launcher_accepts_the_file(file: Path) -> None:
    prepared = prepare_config(launched(file))
    validate_config(prepared)
    assert prepared["provider"]["type"] == launched(file)["provider"]["type"]


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_file_is_valid_by_rays_own_schema(file: Path) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text("utf-8"))
    jsonschema.validate(launched(file), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launched(file), "setup_comands": []}, schema)


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_head_has_no_cpu_and_workers_scale_from_zero(file: Path) -> None:
    types = launched(file)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert "GPU" not in types["cpu"]["resources"]
    for kind in ("gpu", "cpu"):
        assert types[kind]["min_workers"] == 0
        assert types[kind]["max_workers"] >= 1


def test_head_on_premises_has_no_cpu() -> None:
    assert "--num-cpus=0 --num-gpus=0" in launched(LAUNCHED[-1])["head_start_ray_commands"][-1]


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_launched_cluster_requires_its_token(file: Path) -> None:
    found = launched(file)
    assert found["file_mounts"][TOKEN] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in found["setup_commands"]
    assert any("export RAY_AUTH_MODE=token" in command for command in found["initialization_commands"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starting = [command for command in found[key] if "ray start" in command]
        assert starting
        assert all("RAY_AUTH_MODE=token ray start" in command for command in starting)
    assert "--dashboard-host=127.0.0.1" in found["head_start_ray_commands"][-1]
    assert {".venv", "runs", ".git"} <= set(found["rsync_exclude"])


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_accepts_the_manifest(kind: str) -> None:
    document = manifests()[kind]
    kuberay(document)
    spec = document["spec"] if kind == "RayCluster" else document["spec"]["rayClusterSpec"]
    for pod in pods(spec):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod}
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts limits"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert spec["rayVersion"] == pinned[1]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("authOptions", "mode"), "tokens"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("workerGroupSpec",), []),
        (("workerGroupSpecs", 0, "minReplicas"), "0"),
        (("workerGroupSpecs", 0, "replica"), 0),
    ],
)
def test_manifest_that_kuberay_refuses_is_noticed(path: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(manifests()["RayCluster"])
    here = document["spec"]
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        kuberay(document)


def test_job_manifest_has_the_same_cluster_and_a_valid_command() -> None:
    cluster, job = manifests()["RayCluster"], manifests()["RayJob"]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    command, stage, recipe, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (command, stage) == ("firstlight", "run")
    found = load_recipe(ROOT / Path(recipe).relative_to("/home/firstlight"), tuple(overrides))
    assert found.scale.address == "auto"
    assert str(found.storage).startswith("/shared/")


def test_image_is_pinned_not_root_and_constrained() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert bases
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) for base in bases)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    assert all(
        "--constraint constraints.txt" in part
        for line in lines
        if line.startswith("RUN")
        for part in line.split("&&")
        if "pip install" in part
    )


def test_image_contains_only_listed_files() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    let_in = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    lines = [
        line.split()[1:-1]
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
    ]
    copied = {name for names in lines for name in names}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in let_in)
