"""What ships to start a cluster with is what Ray, Serve and Kubernetes take."""

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private import util as launcher
from ray.serve.schema import ServeDeploySchema

import serve.app
from cluster.serve_autoscaling import ApplicationPolicy
from serve.config import Settings

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERAY = CLUSTER / "kuberay"
# `kuberay-operator/crds/ray.io_rayservices.yaml` of KubeRay v1.7.0 (Apache 2.0): its version v1.
RAY_SERVICE = Path(__file__).parents[1] / "data" / "rayservice_v1_schema.json.gz"
KUBERNETES = "1.37"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def kubernetes_files() -> list[Path]:
    return sorted(set(KUBERAY.glob("*.yaml")) - {KUBERAY / "kustomization.yaml"})


def ray_service() -> dict[str, Any]:
    (service,) = documents(KUBERAY / "rayservice.yaml")
    return service


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


def serve_configs() -> dict[str, dict[str, Any]]:
    return {
        "serve-autoscaling.yaml": documents(CLUSTER / "serve-autoscaling.yaml")[0],
        "kuberay/rayservice.yaml": yaml.safe_load(ray_service()["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve-autoscaling.yaml", "kuberay/rayservice.yaml"])
def test_serve_and_kelvin_take_the_application(name):
    (application,) = ServeDeploySchema.model_validate(serve_configs()[name]).applications
    assert application.import_path == "serve.app:build"
    assert callable(serve.app.build)
    assert application.autoscaling_policy["policy_function"] == (
        f"{ApplicationPolicy.__module__}:{ApplicationPolicy.__name__}"
    )
    settings = Settings.model_validate(application.args)
    assert {pool.accelerator_type for pool in settings.denoiser} >= {"H100", "L4"}
    assert not settings.embedded_store.enabled


def test_rays_launcher_takes_the_cluster_on_aws(monkeypatch):
    config = launcher.prepare_config(documents(CLUSTER / "aws.yaml")[0])
    launcher.validate_config(config)
    types = config["available_node_types"]
    served = serve_configs()["serve-autoscaling.yaml"]["applications"][0]["args"]["denoiser"]
    there = {name for each in types.values() for name in each["resources"]}
    assert {f"accelerator_type:{pool['accelerator_type']}" for pool in served} <= there
    assert not types[config["head_node_type"]]["resources"].get("GPU")
    # A card that waits longer than the plan keeps it is not taken away and brought again.
    assert config["idle_timeout_minutes"] * 60 > Settings().autoscaling.scale_in_after_s


def test_a_misspelt_setting_of_the_launcher_is_seen():
    config = documents(CLUSTER / "aws.yaml")[0]
    config["available_node_types"]["l4"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError):
        launcher.validate_config(launcher.prepare_config(config))


@pytest.mark.parametrize("path", kubernetes_files(), ids=lambda path: path.name)
def test_kubernetes_takes_it(path):
    for document in documents(path):
        if document["kind"] == "RayService":
            check_ray_service(document)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_pods_of_the_ray_service_are_pods():
    cluster = ray_service()["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
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


def test_every_pool_finds_a_group_with_its_card():
    service = ray_service()
    args = serve_configs()["kuberay/rayservice.yaml"]["applications"][0]["args"]
    pools = [*args["denoiser"], *args["text_encoder"], *args["vae_decoder"]]
    groups = {
        group["groupName"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    assert {pool["accelerator_type"].lower() for pool in pools} < groups


def test_kustomization_names_what_is_there_and_no_example():
    (kustomization,) = documents(KUBERAY / "kustomization.yaml")
    listed = {KUBERAY / name for name in kustomization["resources"]}
    assert listed == {path for path in kubernetes_files() if "example" not in path.name}


def test_budgets_and_policies_select_pods_that_there_are():
    cluster = ray_service()["spec"]["rayClusterConfig"]
    labels = [
        group["template"]["metadata"]["labels"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    for budget in documents(KUBERAY / "disruption-budgets.yaml"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= pod.items() for pod in labels)


def test_rays_version_is_the_one_installed():
    import ray

    assert ray_service()["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
