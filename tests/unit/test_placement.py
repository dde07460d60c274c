"""Pools go to the nodes that settings name, and what cannot fit its card is refused."""

import re
from typing import Any

import pytest
from pydantic import ValidationError
from ray._private.label_utils import validate_label_selector

from cluster.card_kinds import card_kind
from serve.app import build
from serve.config import PoolSettings, Settings, load_settings
from serve.errors import ConfigurationError
from serve.local_ray import reserved_by

# Of the pico model, whose forwards are small: it takes many rows of a large picture to fill cards.
HUGE: dict[str, Any] = {"warm_sizes": [[8192, 8192]], "warm_rows": [32]}


def settings(**pools: Any) -> Settings:
    return Settings.model_validate({"model": {"path": "pico"}, **pools})


def deployed(**pools: Any) -> dict[str, Any]:
    """Return name -> what Serve is asked for."""
    bound = build(settings(**pools))._bound_deployment
    return {name: argument._bound_deployment for name, argument in bound.init_args[2].items()}


def test_serve_is_asked_for_the_nodes_that_a_pool_names():
    card = {"num_gpus": 0.5, "accelerator_type": "L4"}
    asked = deployed(
        denoiser=[
            {
                "name": "h100",
                "num_gpus": 1,
                "accelerator_type": "H100",
                "precision": "fp8",
                "label_selector": {"market": "!spot"},
                "max_replicas_per_node": 2,
            },
            {"name": "a10g", "num_gpus": 1, "accelerator_type": "A10G", "precision": "bf16"},
        ],
        text_encoder=[{"name": "text", **card}, {"name": "text-cpu", "num_gpus": 0}],
        vae_decoder=[{"name": "decode", **card, "min_replicas": 1, "max_replicas": 2}],
    )
    h100 = asked["h100"]
    assert h100.ray_actor_options["label_selector"] == {"market": "!spot"}
    assert h100.ray_actor_options["accelerator_type"] == "H100"
    assert h100._replica_config.max_replicas_per_node == 2
    assert "label_selector" not in asked["a10g"].ray_actor_options
    assert asked["a10g"]._replica_config.max_replicas_per_node is None
    shared = (asked["text"].ray_actor_options, asked["decode"].ray_actor_options)
    assert [options["num_gpus"] for options in shared] == [0.5, 0.5]
    assert asked["text-cpu"].ray_actor_options["num_gpus"] == 0


def test_pipelines_go_to_the_nodes_that_settings_name():
    placed = settings(
        pipeline={
            "num_replicas": 2,
            "label_selector": {"market": "!spot"},
            "max_replicas_per_node": 1,
        }
    )
    asked = build(placed)._bound_deployment
    assert asked.ray_actor_options["label_selector"] == {"market": "!spot"}
    assert asked._replica_config.max_replicas_per_node == 1
    anywhere = build(settings())._bound_deployment
    assert "label_selector" not in anywhere.ray_actor_options
    assert anywhere._replica_config.max_replicas_per_node is None


def test_a_redeploy_starts_a_new_one_first_where_it_takes_no_card_or_is_asked_to():
    asked = deployed(denoiser=[{"name": "denoiser", "num_gpus": 1, "max_surge_percent": 1}])
    assert asked["denoiser"]._deployment_config.max_surge_percent == 1
    assert asked["text-encoder"]._deployment_config.max_surge_percent == 0
    bound = build(settings())._bound_deployment
    assert bound._deployment_config.max_surge_percent == 1


def test_a_ray_of_our_own_has_room_for_what_a_redeploy_starts_first():
    pool = {"name": "denoiser", "num_cpus": 1, "max_surge_percent": 1}
    few, many = (PoolSettings(**pool, num_replicas=number) for number in (3, 150))
    assert reserved_by([few])["CPU"] == 3
    assert reserved_by([few], at_most=True)["CPU"] == 4
    assert reserved_by([many], at_most=True)["CPU"] == 152


@pytest.mark.parametrize(
    "selector",
    [
        {"market": "spot"},
        {"market": "!spot"},
        {"ray.io/accelerator-type": "in(L4, A10G)"},
        {"ray.io/zone": "!in(a,b)"},
    ],
)
def test_selectors_that_are_taken_are_rays(selector: dict[str, str]):
    assert validate_label_selector(selector) is None
    assert PoolSettings(name="a", label_selector=selector).label_selector == selector


@pytest.mark.parametrize(
    "selector", [{"market": "in()"}, {"market": "-spot"}, {"mar ket": "spot"}, {"": "spot"}]
)
def test_what_ray_would_not_take_is_refused(selector: dict[str, str]):
    assert validate_label_selector(selector) is not None
    with pytest.raises(ValidationError):
        PoolSettings(name="a", label_selector=selector)


def test_a_wrong_selector_is_told_by_its_setting():
    pool = {"name": "a", "label_selector": {"market": "in("}}
    with pytest.raises(ConfigurationError) as caught:
        load_settings(overrides={"denoiser": [pool]})
    assert "label_selector" in str(caught.value.field)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_gpus", 1.5),
        ("num_gpus", 0.00001),
        ("num_cpus", 0.12345),
        ("accelerator_type", ""),
        ("accelerator_type", "L4\n"),
    ],
)
def test_what_ray_would_refuse_or_wait_for_in_vain_is_refused(name: str, value: Any):
    with pytest.raises(ConfigurationError) as caught:
        load_settings(overrides={"denoiser": [{"name": "a", name: value}]})
    assert (caught.value.field, caught.value.value) == (f"denoiser.0.{name}", value)


def test_whole_cards_and_shares_are_taken():
    for cards in (0, 0.0001, 0.5, 1, 2):
        assert PoolSettings(name="a", num_gpus=cards).num_gpus == cards


def gib(message: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d) GiB", message)]


def test_a_pool_too_large_for_its_card_is_refused_with_the_arithmetic():
    pool = {"name": "denoiser-t4", "num_gpus": 1, "accelerator_type": "T4", **HUGE}
    with pytest.raises(ConfigurationError) as caught:
        build(settings(denoiser=[pool]))
    error = caught.value
    assert (error.field, error.value) == ("denoiser-t4.accelerator_type", "T4")
    there = card_kind("T4").memory_gib
    assert there is not None
    assert gib(error.message)[0] > there
    assert "on 1 of the card" in error.message
    assert f"has {there:.1f}" in error.message
    assert "H200" in str(error.allowed)
    assert "T4" not in str(error.allowed)


def test_what_may_share_a_card_adds_up():
    on_l4 = {"num_gpus": 0.5, "accelerator_type": "L4", **HUGE}  # HUGE takes 16.1 of 22 GiB
    decoder = {"name": "decode", **on_l4, "warm_rows": [], "decode_memory_gib": 10}
    denoiser = {"name": "denoise", **on_l4}
    with pytest.raises(ConfigurationError) as caught:
        build(settings(denoiser=[denoiser], vae_decoder=[decoder]))
    error = caught.value
    assert (error.field, error.value) == ("denoise.num_gpus", 0.5)
    assert "decode 10.6 GiB" in error.message
    assert "0.5 of the card" in error.message
    there, together = (float(n) for n in re.findall(r"(?:has|take) (\d+\.\d)", error.message))
    assert there == card_kind("L4").memory_gib
    assert together > there
    for fitting in (
        [{**denoiser, "num_gpus": 0.6}, decoder],  # never on one card
        [denoiser, {**decoder, "decode_memory_gib": 3}],
        [denoiser, {**decoder, "accelerator_type": "A10G"}],
    ):
        assert build(settings(denoiser=[fitting[0]], vae_decoder=[fitting[1]])) is not None


def test_replicas_of_one_pool_share_a_card_too():
    pool = {"name": "a", "num_gpus": 0.1, "accelerator_type": "H200", **HUGE}
    assert build(settings(denoiser=[pool])) is not None
    with pytest.raises(ConfigurationError):
        build(settings(denoiser=[{**pool, "min_replicas": 1, "max_replicas": 10}]))
    # As many again, but never two on one card.
    whole = {**pool, "num_gpus": 1, "min_replicas": 1, "max_replicas": 10}
    assert build(settings(denoiser=[whole])) is not None


def test_cards_of_which_nothing_is_known_are_not_judged():
    pool = {"name": "a", "num_gpus": 1, **HUGE}
    assert build(settings(denoiser=[pool])) is not None
    assert build(settings(denoiser=[{**pool, "accelerator_type": "B300"}])) is not None
    on_cpu = {**pool, "num_gpus": 0, "accelerator_type": "T4"}
    assert build(settings(denoiser=[on_cpu])) is not None
