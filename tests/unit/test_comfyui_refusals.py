"""What is wrong with a ComfyUI workflow is said in ComfyUI's own errors, at the right node."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.http.comfyui_chains import chains_of
from serve.http.comfyui_errors import PromptError
from serve.http.comfyui_graph import checked_graph
from serve.http.comfyui_nodes import NODES
from serve.requests import GenerateRequest
from tests.unit.comfyui_graphs import (
    CATALOGUE,
    WORKFLOWS,
    changed,
    errors,
    kinds,
    node,
    requests,
    workflow,
)

BROKEN: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "a missing input": ({"n5": {"seed": None}}, {"5": ["required_input_missing"]}),
    "too few steps": ({"n5": {"steps": 0}}, {"5": ["value_smaller_than_min"]}),
    "too many steps": ({"n5": {"steps": 201}}, {"5": ["value_bigger_than_max"]}),
    "a seed of 65 bits": ({"n5": {"seed": 2**64}}, {"5": ["value_bigger_than_max"]}),
    "no number": ({"n5": {"cfg": "much"}}, {"5": ["invalid_input_type"]}),
    "not a number": ({"n5": {"cfg": float("nan")}}, {"5": ["invalid_input_type"]}),
    "an unknown sampler": ({"n5": {"sampler_name": "heun"}}, {"5": ["value_not_in_list"]}),
    "an unknown scheduler": ({"n5": {"scheduler": "karras"}}, {"5": ["value_not_in_list"]}),
    "two at once": (
        {"n5": {"scheduler": "karras", "steps": 0}},
        {"5": ["value_smaller_than_min", "value_not_in_list"]},
    ),
    "two nodes": (
        {"n5": {"steps": 0}, "n4": {"width": 8}},
        {"5": ["value_smaller_than_min"], "4": ["value_smaller_than_min"]},
    ),
    "an unknown checkpoint": (
        {"n1": {"ckpt_name": "sdxl.safetensors"}},
        {"1": ["value_not_in_list"]},
    ),
    "a link of three": ({"n6": {"samples": ["5", 0, 0]}}, {"6": ["bad_linked_input"]}),
    "a link to nowhere": ({"n6": {"samples": ["99", 0]}}, {"6": ["bad_linked_input"]}),
    "an output that is not there": ({"n6": {"samples": ["5", 1]}}, {"6": ["bad_linked_input"]}),
    "the wrong kind of link": ({"n6": {"samples": ["1", 0]}}, {"6": ["return_type_mismatch"]}),
    "a value for a link": ({"n6": {"samples": 1}}, {"6": ["invalid_input_type"]}),
    "no multiple of 16": ({"n4": {"width": 1000}}, {"4": ["custom_validation_failed"]}),
    "an empty prompt": ({"n2": {"text": ""}}, {"2": ["custom_validation_failed"]}),
    "a denoise of nothing": ({"n5": {"denoise": 0.5}}, {"5": ["not_supported_yet"]}),
    "a prefix that leaves": (
        {"n7": {"filename_prefix": "../../x"}},
        {"7": ["custom_validation_failed"]},
    ),
}


@pytest.mark.parametrize(("change", "expected"), BROKEN.values(), ids=list(BROKEN))
def test_what_is_wrong_is_said_at_its_node(change: dict[str, Any], expected: dict[str, list[str]]):
    graph = changed(**change)
    assert kinds(graph) == expected
    for told in errors(graph).values():
        for error in told:
            json.dumps(error, allow_nan=False)
            assert error.keys() == {"type", "message", "details", "extra_info"}
            assert error["details"]


def test_errors_read_as_comfyuis_do():
    told = errors(changed(n5={"sampler_name": "heun"}, n4={"width": 8}))
    assert told["4"][0] == {
        "type": "value_smaller_than_min",
        "message": "Value 8 smaller than min of 16",
        "details": "width",
        "extra_info": {
            "input_name": "width",
            "input_config": ["INT", {"default": 512, "min": 16, "max": 16384, "step": 8}],
            "received_value": 8,
        },
    }
    assert told["5"][0]["message"] == "Value not in list"
    assert told["5"][0]["details"].startswith("sampler_name: 'heun' not in ['euler', ")


def test_what_kelvin_refuses_carries_its_field_value_and_remedy():
    (error,) = errors(changed(n4={"width": 1000}))["4"]
    assert error["extra_info"] == {
        "input_name": "width",
        "field": "width",
        "received_value": 1000,
        "allowed": GenerateRequest.allowed()["width"],
        "code": "invalid_request",
    }


NOT_YET = [
    "KSamplerAdvanced",
    "SamplerCustom",
    "SamplerCustomAdvanced",
    "LatentUpscale",
    "ControlNetApplyAdvanced",
]


@pytest.mark.parametrize("class_type", NOT_YET)
def test_nodes_that_are_to_come_are_named_at_their_place(class_type: str):
    graph = workflow("guide")
    graph["6"]["inputs"]["samples"] = ["8", 0]
    graph["8"] = node(class_type)
    (error,) = errors(graph)["8"]
    assert error["type"] == "not_supported_yet"
    assert class_type in error["message"]


@pytest.mark.parametrize(
    ("class_type", "inputs", "into"),
    [
        ("SkipLayerGuidanceSD3", {"model": ["1", 0]}, ("5", "model")),
        ("ControlNetApplySD3", {"positive": ["2", 0]}, ("5", "positive")),
        ("UpscaleModelLoader", {}, ("7", "images")),
        ("ImageUpscaleWithModel", {"image": ["6", 0]}, ("7", "images")),
        ("ConditioningConcat", {}, ("5", "negative")),
        ("CLIPSetLastLayer", {"clip": ["1", 1]}, ("2", "clip")),
    ],
)
def test_so_they_are_wherever_they_stand(
    class_type: str, inputs: dict[str, Any], into: tuple[str, str]
):
    graph = workflow("guide") | {"8": node(class_type, **inputs)}
    graph[into[0]]["inputs"][into[1]] = ["8", 0]
    assert kinds(graph) == {"8": ["not_supported_yet"]}


def test_a_node_that_no_output_needs_disturbs_nobody():
    assert requests(workflow("guide") | {"8": node("KSamplerAdvanced")})


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        ({}, "invalid_prompt"),
        ([], "invalid_prompt"),
        ("text", "invalid_prompt"),
        ({"1": {}}, "invalid_prompt"),
        ({"1": 5}, "invalid_prompt"),
        ({"1": {"class_type": "SaveImage", "inputs": []}}, "invalid_prompt"),
        ({"nodes": [], "links": [], "version": 0.4}, "invalid_prompt"),
        ({str(each): node("VAELoader") for each in range(3000)}, "invalid_prompt"),
        ({"1": node("VAELoader")}, "prompt_no_outputs"),
        ({"1": node("Foo"), "2": node("Bar")}, "missing_node_type"),
    ],
)
def test_what_is_no_workflow_is_refused_as_a_whole(graph: Any, kind: str):
    with pytest.raises(PromptError) as caught:
        checked_graph(graph, CATALOGUE)
    body = caught.value.comfyui_body()
    assert body["error"]["type"] == kind
    assert body["node_errors"] == {}
    if kind == "missing_node_type":
        assert body["error"]["extra_info"]["unknown"] == ["Bar", "Foo"]


def test_an_output_that_fails_leaves_the_others():
    checked = checked_graph(changed("two_chains", n20={"steps": 0}), CATALOGUE)
    chains = chains_of(checked, CATALOGUE)
    assert [list(chain.outputs) for chain in chains] == [["12", "13"]]
    assert checked.node_errors["20"]["dependent_outputs"] == ["22"]
    both = checked_graph(changed("two_chains", n1={"ckpt_name": "x"}), CATALOGUE)
    assert both.outputs == []
    assert both.node_errors["1"]["dependent_outputs"] == ["12", "13", "22"]
    assert "x" in both.failed().comfyui_body()["error"]["details"]


def test_a_second_sampler_in_a_chain_is_refused():
    graph = workflow("two_chains")
    graph["20"]["inputs"]["latent_image"] = ["10", 0]
    checked = checked_graph(graph, CATALOGUE)
    chains_of(checked, CATALOGUE)
    assert checked.outputs == ["12", "13"]
    assert checked.node_errors["20"]["errors"][0]["type"] == "not_supported_yet"


def test_parts_of_two_models_do_not_mix():
    graph = workflow("guide")
    graph["9"] = node("CheckpointLoaderSimple", ckpt_name="sd3.5_medium.safetensors")
    graph["2"]["inputs"]["clip"] = ["9", 1]
    assert kinds(graph) == {"9": ["not_supported_yet"]}


def test_circles_end():
    graph = workflow("loras")
    graph["21"]["inputs"]["model"] = ["21", 0]
    assert kinds(graph) == {"21": ["dependency_cycle"]}
    graph = workflow("makers_negative_range")
    graph["68"]["inputs"]["conditioning"] = ["69", 0]
    assert kinds(graph) == {"69": ["dependency_cycle"]}


def test_a_tree_of_conditionings_that_doubles_is_refused_at_once():
    graph = workflow("makers_negative_range")
    below = "71"
    for level in range(60):
        name = f"c{level}"
        links = {"conditioning_1": [below, 0], "conditioning_2": [below, 0]}
        graph[name] = node("ConditioningCombine", **links)
        below = name
    graph["271"]["inputs"]["negative"] = [below, 0]
    (told,) = kinds(graph).values()
    assert told == ["not_supported_yet"]


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-1, 3), st.sampled_from([*"123456789", "x"])), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(path.stem for path in WORKFLOWS.glob("*.json"))),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12), _VALUES), max_size=4),
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(sorted(NODES))), max_size=2),
)
def test_whatever_is_in_a_workflow_the_answer_is_typed(
    name: str, values: list[tuple[int, int, Any]], types: list[tuple[int, str]]
):
    graph = copy.deepcopy(workflow(name))
    ids = list(graph)
    for which, class_type in types:
        graph[ids[which % len(ids)]]["class_type"] = class_type
    for which, place, value in values:
        inputs = graph[ids[which % len(ids)]]["inputs"]
        inputs[list(inputs)[place % len(inputs)]] = value
    try:
        told = errors(graph)
    except PromptError:
        return
    json.dumps(told, allow_nan=False)
