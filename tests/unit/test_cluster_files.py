"""What ships to start a cluster with is what Ray, Serve and Kubernetes take."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private import util as launcher
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.serve.schema import ServeDeploySchema

import serve.app
from cluster.serve_autoscaling import ApplicationPolicy
from serve.commands.hardware import OLDEST_DRIVER
from serve.commands.overrides import settings_from_options
from serve.config import Settings, load_settings
from serve.http.proxy_headers import ENVIRONMENT
from serve.key_store import ObjectKeys, key_store

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERAY = CLUSTER / "kuberay"
# `kuberay-operator/crds/ray.io_rayservices.yaml` of KubeRay v1.7.0 (Apache 2.0): its version v1.
RAY_SERVICE = Path(__file__).parents[1] / "data" / "rayservice_v1_schema.json.gz"
KUBERNETES = "1.37"
# Cores and GiB of memory, as EC2 lists them.
_MACHINES = {"g6.2xlarge": (8, 32), "g5.2xlarge": (8, 32), "p5.4xlarge": (16, 256)}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def kubernetes_files() -> list[Path]:
    return sorted(set(KUBERAY.glob("*.yaml")) - {KUBERAY / "kustomization.yaml"})


def ray_service() -> dict[str, Any]:
    (service,) = documents(KUBERAY / "rayservice.yaml")
    return service


def _groups() -> list[dict[str, Any]]:
    """Return the head's group and the workers'."""
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


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
        "aws-serve.yaml": documents(CLUSTER / "aws-serve.yaml")[0],
        "kuberay/rayservice.yaml": yaml.safe_load(ray_service()["spec"]["serveConfigV2"]),
    }


def most_cards(application: dict[str, Any]) -> dict[str, float]:
    """Return kind of card -> how many of it an application may ask for at most."""
    cards: dict[str, float] = {}
    for pools in Settings.model_validate(application["args"]).pools.values():
        for pool in pools:
            kind = str(pool.accelerator_type)
            cards[kind] = cards.get(kind, 0.0) + pool.num_gpus * pool.most_replicas
    return cards


@pytest.mark.parametrize("name", serve_configs())
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


def test_rays_launcher_takes_the_cluster_on_aws():
    config = launcher.prepare_config(documents(CLUSTER / "aws.yaml")[0])
    launcher.validate_config(config)
    types = config["available_node_types"]
    there = {
        name.removeprefix("accelerator_type:"): each["max_workers"]
        for each in types.values()
        for name in each["resources"]
        if name.startswith("accelerator_type:")
    }
    assert most_cards(serve_configs()["aws-serve.yaml"]["applications"][0]) == there
    assert sum(there.values()) == config["max_workers"]
    assert not types[config["head_node_type"]]["resources"].get("GPU")
    # A card that waits longer than the plan keeps it is not taken away and brought again.
    assert config["idle_timeout_minutes"] * 60 > Settings().autoscaling.scale_in_after_s


def test_nodes_on_aws_bring_the_model_from_s3_to_a_disk_that_outlives_their_container():
    args = serve_configs()["aws-serve.yaml"]["applications"][0]["args"]
    model = Settings.model_validate(args).model
    assert model.path.startswith("s3://")
    aws = documents(CLUSTER / "aws.yaml")[0]
    mounted = [each.split(":")[-1] for each in aws["docker"]["run_options"] if "-v " in each]
    assert mounted == ["/home/ray/.cache"]
    assert Path(model.source.cache_dir).is_relative_to("~/.cache")


def test_who_has_no_token_is_not_let_in_by_rays_ports():
    aws = documents(CLUSTER / "aws.yaml")[0]
    assert any("RAY_AUTH_MODE=token" in each for each in aws["docker"]["run_options"])
    assert aws["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert ray_service()["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"


@pytest.mark.parametrize("name", ["aws-serve.yaml", "kuberay/rayservice.yaml"])
def test_the_key_that_the_files_tell_to_make_is_one_of_the_service(name):
    text = (CLUSTER / name).read_text(encoding="utf-8")
    (typed,) = re.findall(r"kelvin keys create [^'\n]*", text)
    made = settings_from_options(None, re.findall(r"--set (\S+)", typed))
    served = Settings.model_validate(serve_configs()[name]["applications"][0]["args"])
    assert isinstance(key_store(made), ObjectKeys)  # not a file in the pod that nobody reads
    assert made.storage == (served.journal.storage or served.storage)


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
    for group in _groups():
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
    cluster = {"metadata": {"name": "kelvin", "namespace": "default"}}
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


def test_pods_leave_room_on_the_machines_they_ask_for():
    (head, *workers) = _groups()
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
    labels = [group["template"]["metadata"]["labels"] for group in _groups()]
    for budget in documents(KUBERAY / "disruption-budgets.yaml"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= pod.items() for pod in labels)
        # Kubernetes reckons maxUnavailable, and shares, by an owner's subresource `scale`, which
        # RayCluster has not; with either it lets no pod go.
        assert budget["spec"].keys() == {"minAvailable", "selector"}
        assert isinstance(budget["spec"]["minAvailable"], int)


def test_who_kelvin_runs_as_may_write_the_nodes_cache():
    image = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"useradd .*--uid (\d+) ray", image)
    assert found is not None
    user = found[1]
    for group in _groups():
        spec = group["template"]["spec"]
        on_the_node = [each["name"] for each in spec["volumes"] if "hostPath" in each]
        (mount,) = (
            each["mountPath"]
            for each in spec["containers"][0]["volumeMounts"]
            if each["name"] in on_the_node
        )
        (made,) = spec["initContainers"]
        assert made["command"] == ["chown", f"{user}:{user}", mount]
        assert made["securityContext"]["runAsUser"] == 0
        assert mount in [each["mountPath"] for each in made["volumeMounts"]]
    aws = documents(CLUSTER / "aws.yaml")[0]
    options = aws["docker"]["run_options"]
    written = [
        each.split(":")[0].removeprefix("-v ") for each in options if each.endswith(".cache")
    ]
    made = [
        each.split()[-1] for each in aws["initialization_commands"] if f"--owner {user} " in each
    ]
    assert written == made != []


def test_the_image_has_what_those_who_start_it_run_in_it():
    image = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    installed = re.search(r"apt-get install ([^&]*)", image)
    assert installed is not None
    # KubeRay's probe of a RayService's workers; Ray's launcher, and its autoscaler on the head.
    assert {"wget", "rsync", "openssh-client"} <= set(installed[1].split())
    assert '"boto3"' in image
    assert all(f"ENV {name}={value}\n" in image for name, value in ENVIRONMENT.items())
    # Torch's wheel on PyPI, as constraints.txt pins it, is of CUDA 13.
    assert f"R{OLDEST_DRIVER[13]} or newer, for CUDA 13" in image


def test_the_image_alone_writes_where_its_user_may():
    image = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    folder = load_settings(CLUSTER / "local.yaml").embedded_store.data_dir
    assert not Path(folder).is_absolute()
    *_, last = re.findall(r"^WORKDIR (\S+)$", image, re.MULTILINE)
    assert f"--owner ray --group ray {last}/{folder}\n" in image
    assert '"/opt/kelvin/cluster/local.yaml"' in image


def test_rays_version_is_the_one_installed():
    import ray

    assert ray_service()["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
