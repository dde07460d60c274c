"""Settings: which source wins, and that every mistake is a typed error that names the setting."""

import importlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve.config import Settings, StorageSettings, load_settings
from serve.errors import ConfigurationError

_ROOT = Path(__file__).parents[2]
_SERVE_CONFIG = _ROOT / "cluster" / "serve-autoscaling.yaml"
# Ray's and Serve's, not settings alone: test_cluster_files.py
_ON_AWS = {_ROOT / "cluster" / "aws.yaml", _ROOT / "cluster" / "aws-serve.yaml"}
_SHIPPED = sorted(set((_ROOT / "cluster").glob("*.yaml")) - {_SERVE_CONFIG} - _ON_AWS)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_defaults():
    assert load_settings() == Settings()


@pytest.mark.parametrize("path", _SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_valid(path):
    load_settings(path)


def test_local_file_is_shipped_and_says_the_defaults():
    assert _ROOT / "cluster" / "local.yaml" in _SHIPPED
    assert load_settings(_ROOT / "cluster" / "local.yaml") == Settings()


def test_serve_config_is_valid_and_names_the_policy():
    config = yaml.safe_load(_SERVE_CONFIG.read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.autoscaling_policy is not None
    module, name = application.autoscaling_policy["policy_function"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = Settings.model_validate(application.args)
    assert [pool.name for pool in settings.denoiser] == ["denoiser-h100", "denoiser-l4"]
    assert all(pool.is_autoscaled for pools in settings.pools.values() for pool in pools)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_replicas": 1},
        {"max_replicas": 2},
        {"min_replicas": 2, "max_replicas": 3},
        {"min_replicas": 0, "max_replicas": 3, "num_replicas": 4},
        {"min_replicas": 3, "max_replicas": 2, "num_replicas": 3},
        {"num_replicas": 0},
    ],
    ids=str,
)
def test_replicas_lie_within_their_bounds(wrong):
    with pytest.raises(ConfigurationError):
        load_settings(None, {"denoiser": [{"name": "denoiser", **wrong}]})


def test_a_pool_may_begin_with_nothing():
    pool = {"name": "denoiser", "num_replicas": 0, "min_replicas": 0, "max_replicas": 3}
    (loaded,) = load_settings(None, {"denoiser": [pool]}).denoiser
    assert loaded.is_autoscaled
    assert loaded.most_replicas == 3


def test_a_stage_may_have_several_pools():
    pools = [{"name": "h100"}, {"name": "l4"}]
    settings = load_settings(None, {"denoiser": pools})
    assert [pool.name for pool in settings.pools["denoise"]] == ["h100", "l4"]
    with pytest.raises(ConfigurationError, match="name of its own"):
        load_settings(None, {"denoiser": [*pools, {"name": "h100"}]})


def test_later_sources_win(tmp_path, monkeypatch):
    path = _file(tmp_path, "storage: {bucket: from-file, region: from-file, prefix: from-file}")
    monkeypatch.setenv("KELVIN_STORAGE__BUCKET", "from-environment")
    monkeypatch.setenv("KELVIN_STORAGE__REGION", "from-environment")
    storage = load_settings(path, {"storage": {"bucket": "from-override"}}).storage
    assert storage.bucket == "from-override"
    assert storage.region == "from-environment"
    assert storage.prefix == "from-file/"
    assert storage.url_expiry_s == StorageSettings().url_expiry_s


def test_environment_reaches_every_kind_of_setting(monkeypatch):
    monkeypatch.setenv("KELVIN_HTTP__PORT", "9000")
    monkeypatch.setenv("KELVIN_EMBEDDED_STORE__ENABLED", "false")
    monkeypatch.setenv("KELVIN_DENOISER", '[{"name": "denoiser", "num_replicas": 2}]')
    loaded = load_settings()
    assert loaded.http.port == 9000
    assert loaded.embedded_store.enabled is False
    assert loaded.denoiser[0].num_replicas == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"warm_sizes": [[1000, 1024]]},
        {"warm_sizes": [[0, 16]]},
        {"warm_sizes": [1024]},
        {"warm_rows": [0]},
        {"warm_rows": [33]},
    ],
    ids=str,
)
def test_what_start_up_warms_must_be_possible(wrong):
    with pytest.raises(ConfigurationError) as raised:
        load_settings(None, {"denoiser": [{"name": "denoiser", **wrong}]})
    assert next(iter(wrong)) in str(raised.value.field)


def test_unrelated_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("STORAGE", "x")
    monkeypatch.setenv("KELVINATOR", "x")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("storage: {bukcet: x}", "storage.bukcet"),
        ("storag: {}", "storag"),
        ("storage: {url_expiry_s: 0}", "storage.url_expiry_s"),
        ("storage: {url_expiry_s: 700000}", "storage.url_expiry_s"),
        ("storage: {bucket: x}", "storage.bucket"),
        ("storage: 7", "storage"),
        ("denoiser: []", "denoiser"),
        ("denoiser: [{}]", "denoiser.0.name"),
        ("autoscaling: {policy: temperature}", "autoscaling.policy"),
        ("autoscaling: {target_utilisation: 1.5}", "autoscaling.target_utilisation"),
        # The plan divides by these: infinite ones would make it no number.
        ("autoscaling: {fast_s: .inf}", "autoscaling.fast_s"),
        ("autoscaling: {target_wait_s: .inf}", "autoscaling.target_wait_s"),
        ("denoiser: [{name: a, start_s: .inf}]", "denoiser.0.start_s"),
        ("routing: {policy: random}", "routing.policy"),
        ("governor: {below_limit_c: -1}", "governor.below_limit_c"),
        ("denoiser: [{name: Ä}]", "denoiser.0.name"),
        ("denoiser: [{name: a, precision: fp4}]", "denoiser.0.precision"),
        ("http: {port: 65536}", "http.port"),
        ("http: {port: many}", "http.port"),
        ("telemetry: {sampling_ratio: 1.5}", "telemetry.sampling_ratio"),
        # What no file on any machine is called.
        ("model: {path: ''}", "model.path"),
        ('model: {path: "a\\0b.safetensors"}', "model.path"),
        ('model: {path: "\\uD800.safetensors"}', "model.path"),
        ("model: {path: ~nobody-of-that-name/m.safetensors}", "model.path"),
        (f"model: {{models_dir: {'a' * 300}}}", "model.models_dir"),
        (f"model: {{models_dir: {'a/' * 3000}}}", "model.models_dir"),
        ("model: {tokenizers: ~nobody-of-that-name}", "model.tokenizers"),
        (f"model: {{vae: {'a' * 300}}}", "model.vae"),
        (f"model: {{text_encoders: [{'ä' * 150}]}}", "model.text_encoders.0"),
        ("lora: {cache_dir: ~nobody-of-that-name}", "lora.cache_dir"),
    ],
)
def test_mistake_names_the_setting(tmp_path, text, field):
    with pytest.raises(ConfigurationError) as caught:
        load_settings(_file(tmp_path, text))
    assert caught.value.field == field
    assert caught.value.allowed


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "7", "a: [", "\x00", "a: b: c"])
def test_file_that_is_no_mapping(tmp_path, text):
    with pytest.raises(ConfigurationError) as caught:
        load_settings(_file(tmp_path, text))
    assert caught.value.field == "config"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_empty_file_is_all_defaults(tmp_path, text):
    assert load_settings(_file(tmp_path, text)) == Settings()


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigurationError):
        load_settings(path)


def test_file_missing(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        load_settings(tmp_path / "not-there.yaml")


def test_yaml_builds_no_objects(tmp_path):
    with pytest.raises(ConfigurationError):
        load_settings(_file(tmp_path, "model: !!python/object/apply:os.system ['true']"))


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("KELVIN_HTTP__PORT", "many", "http.port"),
        ("KELVIN_STORAGE__BUKCET", "x", "storage.bukcet"),
        ("KELVIN_DENOISER", "not json", "denoiser"),
        ("KELVIN_STORAGE", "not json", "storage"),
    ],
)
def test_mistake_in_the_environment(monkeypatch, name, value, field):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert caught.value.field == field
    assert caught.value.allowed


@given(st.text("ab/.", max_size=12))
def test_prefix_never_begins_with_a_slash_and_ends_with_one(prefix):
    settings = StorageSettings(prefix=prefix)
    assert not settings.prefix.startswith("/")
    assert settings.prefix == "" or settings.prefix.endswith("/")
    assert StorageSettings(prefix=settings.prefix) == settings


def _check(error: ConfigurationError) -> None:
    assert error.field
    assert error.allowed


_TREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["name", "path", "bucket", "port", "x"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "x"]), _TREE, max_size=3))
def test_any_overrides_are_settings_or_a_typed_error(overrides):
    try:
        loaded = load_settings(overrides=overrides)
    except ConfigurationError as error:
        _check(error)
        return
    assert Settings.model_validate(loaded.model_dump()) == loaded


def test_frozen_and_yaml_round_trip(tmp_path):
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.storage.bucket = "y"  # type: ignore[misc]
    path = _file(tmp_path, yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings(path) == settings
