"""What ships for Kubernetes is what Kubernetes, KubeRay and Ray's autoscaler take."""

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from tests.cluster_files import (
    KUBERAY,
    documents,
    labels_asked_for,
    most_cards,
    node_groups,
    ray_service,
    serve_configs,
)

# `kuberay-operator/crds/ray.io_rayservices.yaml` of KubeRay v1.7.0 (Apache 2.0): its version v1.
RAY_SERVICE = Path(__file__).parents[1] / "data" / "rayservice_v1_schema.json.gz"
KUBERNETES = "1.37"
# Cores and GiB of memory, as EC2 lists them.
_MACHINES = {"g6.2xlarge": (8, 32), "g5.2xlarge": (8, 32), "p5.4xlarge": (16, 256)}


def kubernetes_files() -> list[Path]:
    return sorted(set(KUBERAY.glob("*.yaml")) - {KUBERAY / "kustomization.yaml"})


def strict(schema: Any) -> Any:
    """Return a schema in which an object with named properties has no others.

    Kubernetes drops unknown fields with no more than a warning, so a misspelt one would be lost.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return made


def check_ray_service(service: dict[str, Any]) -> None:
    schema = strict(json.loads(gzip.decompress(RAY_SERVICE.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(schema).validate(service)


@pytest.mark.parametrize("path", kubernetes_files(), ids=lambda path: path.name)
def test_kubernetes_takes_it(path):
    for document in documents(path):
        if document["kind"] == "RayService":
            check_ray_service(document)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_pods_of_the_ray_service_are_pods():
    for group in node_groups():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}}
        kubernetes_validate.validate(
            pod | {"spec": group["template"]["spec"]}, KUBERNETES, strict=True
        )


@pytest.mark.parametrize("where", ["spec", "headGroupSpec", "container"])
def test_a_misspelt_field_of_the_ray_service_is_seen(where):
    service = ray_service()
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    place = {
        "spec": service["spec"],
        "headGroupSpec": head,
        "container": head["template"]["spec"]["containers"][0],
    }[where]
    place["servConfig"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="servConfig"):
        check_ray_service(service)


def launched_for(pool: dict[str, Any], service: dict[str, Any]) -> set[str]:
    """Return the groups that Ray's own autoscaler starts for a replica, beside those always there.

    Nothing of the cluster is up yet, so that it goes by what the groups say of themselves.
    """
    cluster: dict[str, Any] = {"metadata": {"name": "kelvin", "namespace": "default"}}
    cluster["spec"] = service["spec"]["rayClusterConfig"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        group["minReplicas"] = 0
    config = AutoscalingConfig(autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster))
    needs = {"CPU": 0.25, "GPU": pool["num_gpus"]}
    needs[f"accelerator_type:{pool['accelerator_type']}"] = 0.001
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(needs)]),
        )
    )
    return {each.instance_type for each in reply.to_launch}


def kuberay_pools() -> list[dict[str, Any]]:
    args = serve_configs()["kuberay/rayservice.yaml"]["applications"][0]["args"]
    return [*args["denoiser"], *args["text_encoder"], *args["vae_decoder"]]


@pytest.mark.parametrize("pool", kuberay_pools(), ids=lambda pool: pool["name"])
def test_kubernetes_brings_a_card_of_its_kind_for_each_pool(pool):
    assert launched_for(pool, ray_service()) == {pool["accelerator_type"].lower()}


def test_a_group_that_does_not_name_its_card_would_never_be_started():
    service = ray_service()
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        group.pop("resources", None)
    assert launched_for(kuberay_pools()[0], service) == set()


def test_kubernetes_may_bring_as_many_cards_as_serve_may_ask_for():
    groups = ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    there = {
        group["groupName"].upper(): group["maxReplicas"] for group in groups if "resources" in group
    }
    assert most_cards(serve_configs()["kuberay/rayservice.yaml"]["applications"][0]) == there


def test_labels_that_serve_asks_for_are_some_groups():
    labelled = [set(group.get("labels", {}).items()) for group in node_groups()]
    asked = labels_asked_for(serve_configs()["kuberay/rayservice.yaml"]["applications"][0])
    assert asked
    assert all(any(each <= labels for labels in labelled) for each in asked)


def test_pods_leave_room_on_the_machines_they_ask_for():
    (head, *workers) = node_groups()
    assert "nodeSelector" not in head["template"]["spec"]
    for group in workers:
        spec = group["template"]["spec"]
        machine = spec.get("nodeSelector", {}).get("node.kubernetes.io/instance-type")
        if machine is None:
            continue
        asked = spec["containers"][0]["resources"]["requests"]
        cores, gib = _MACHINES[machine]
        assert int(asked["cpu"]) < cores
        # EKS keeps some 5 % of the memory for the kubelet and for evicting in time.
        assert int(asked["memory"].removesuffix("Gi")) < 0.9 * gib, machine


def test_kustomization_names_what_is_there_and_no_example():
    (kustomization,) = documents(KUBERAY / "kustomization.yaml")
    listed = {KUBERAY / name for name in kustomization["resources"]}
    assert listed == {path for path in kubernetes_files() if "example" not in path.name}


def test_budgets_and_policies_select_pods_that_there_are():
    templates = [group["template"] for group in node_groups()]
    templates += [
        document["spec"]["template"]
        for document in documents(KUBERAY / "redis.yaml")
        if document["kind"] == "StatefulSet"
    ]
    labels = [template["metadata"]["labels"] for template in templates]
    for policy in documents(KUBERAY / "network-policy.yaml"):
        wanted = policy["spec"]["podSelector"]["matchLabels"].items()
        assert any(wanted <= pod.items() for pod in labels)
    for budget in documents(KUBERAY / "disruption-budgets.yaml"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= pod.items() for pod in labels)
        # Kubernetes reckons maxUnavailable, and shares, by an owner's subresource `scale`, which
        # RayCluster has not; with either it lets no pod go.
        assert budget["spec"].keys() == {"minAvailable", "selector"}
        assert isinstance(budget["spec"]["minAvailable"], int)


def test_rays_version_is_the_one_installed():
    import ray

    assert ray_service()["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
