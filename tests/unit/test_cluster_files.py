"""What ships to start a cluster with is what Ray and Serve take, and the image fits it."""

import re
from pathlib import Path

import jsonschema
import pytest
from ray.autoscaler._private import util as launcher
from ray.serve.schema import ServeDeploySchema

import serve.app
from cluster.serve_autoscaling import ApplicationPolicy
from serve.commands.hardware import OLDEST_DRIVER
from serve.commands.overrides import settings_from_options
from serve.config import Settings, load_settings
from serve.http.proxy_headers import ENVIRONMENT
from serve.key_store import ObjectKeys, key_store
from tests.cluster_files import (
    CLUSTER,
    documents,
    labels_asked_for,
    most_cards,
    node_groups,
    ray_service,
    serve_configs,
)


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
    # What may have no replica begins with none: a machine with cards is not started for nothing.
    idle = [pool for pool in settings.denoiser if pool.min_replicas == 0]
    assert all(pool.num_replicas == 0 for pool in idle)


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
    labelled = [set(each.get("labels", {}).items()) for each in types.values()]
    asked = labels_asked_for(serve_configs()["aws-serve.yaml"]["applications"][0])
    assert asked
    assert all(any(each <= labels for labels in labelled) for each in asked)
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


def test_who_kelvin_runs_as_may_write_the_nodes_cache():
    image = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"useradd .*--uid (\d+) ray", image)
    assert found is not None
    user = found[1]
    for group in node_groups():
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


def test_the_readme_says_where_to_look_for_what_each_module_does():
    named = (CLUSTER / "README.md").read_text(encoding="utf-8")
    modules = {path.name for path in CLUSTER.glob("*.py")} - {"__init__.py"}
    assert not [name for name in sorted(modules) if f"`{name}`" not in named]
