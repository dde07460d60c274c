"""What ComfyUI workflows come to: requests, or ComfyUI's own errors at the right node."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.sd3.sigmas import make_sigmas, steps_taken
from serve.http.comfyui_chains import chains_of
from serve.http.comfyui_conditioning import NEVER
from serve.http.comfyui_errors import PromptError
from serve.http.comfyui_graph import NodeError, checked_graph
from serve.http.comfyui_nodes import NODES, Catalogue
from serve.http.comfyui_requests import request_of
from serve.requests import GenerateRequest

FOLDER = Path(__file__).parents[1] / "workflows"
CATALOGUE = Catalogue(
    {
        "stable-diffusion-3.5-fp8.safetensors": "large",
        "sd3.5_large.safetensors": "large",
        "sd3.5_large_fp8_scaled.safetensors": "large",
        "sd3.5_large_turbo.safetensors": "turbo",
        "sd3.5_medium.safetensors": "medium",
        "sd3_medium_incl_clips.safetensors": "medium",
    },
    loras=("ink.safetensors", "styles/film.safetensors"),
    images={"house.png": "s3://bucket/uploads/default/house.png"},
)
SQUARE = {"width": 1024, "height": 1024}
GUIDE = {
    "prompt": "your positive prompt here",
    "model": "large",
    "seed": 1,
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
    "sampler": "euler",
    "scheduler": "normal",
    **SQUARE,
}
WHALE = {"model": "large", "negative_prompt": "", **SQUARE}
EXPECTED: dict[str, list[tuple[list[str], dict[str, Any]]]] = {
    "guide": [(["7"], GUIDE)],
    "from_a_saved_picture": [
        (
            ["9"],
            {
                "prompt": "a glass teapot, studio photograph",
                "negative_prompt": "watermark",
                "width": 1152,
                "height": 896,
                "sampler": "dpmpp_2m",
                "scheduler": "sgm_uniform",
                "num_inference_steps": 25,
            },
        )
    ],
    "large_triple_clip": [
        (["9"], {"seed": 714823937862231, "guidance_scale": 4.01, "shift": None, **SQUARE})
    ],
    "large_turbo": [
        (
            ["9"],
            {
                "model": "turbo",
                "num_inference_steps": 4,
                "guidance_scale": 1.0,
                "shift": 3.0,
                "height": 768,
            },
        )
    ],
    "medium_three_texts": [
        (
            ["233"],
            {
                "prompt": "a red fox",
                "prompt_2": "a red fox in snow",
                "prompt_3": "a red fox walks through deep snow at dusk, soft light",
                "negative_prompt": "blurry",
                "negative_prompt_2": "",
                "negative_prompt_3": "blurry, text",
                "shift": 5.0,
                "width": 832,
                "height": 1216,
            },
        )
    ],
    "makers_negative_range": [
        (["233"], {"negative_prompt_range": (0.0, 0.1), "model": "medium", "shift": 3.0})
    ],
    "split_files_tiled": [
        (
            ["9"],
            {
                "model": "large",
                "num_images": 2,
                "sampler": "dpmpp_2m_sde",
                "scheduler": "beta",
                "width": 1344,
                "negative_prompt": "lowres",
            },
        )
    ],
    "loras": [(["9"], {"sampler": "euler_ancestral", "prompt": "a harbour in ink"})],
    "primitives": [
        (
            ["7"],
            {
                "prompt": "a green kite over a field",
                "width": 768,
                "height": 768,
                "guidance_scale": 6.0,
                "seed": 1234567890123,
            },
        )
    ],
    "two_chains": [
        (["12", "13"], {"prompt": "a blue whale", "seed": 1, "num_inference_steps": 20, **WHALE}),
        (["22"], {"prompt": "an orange whale", "seed": 2, "num_inference_steps": 10, **WHALE}),
    ],
    "image_to_image": [
        (
            ["9"],
            {
                "init_image": "s3://bucket/uploads/default/house.png",
                "num_inference_steps": 33,
                "width": None,
                "height": None,
            },
        )
    ],
    "batch_to_websocket": [
        (["save_image_websocket_node"], {"num_images": 4, "seed": 2**64 - 1, "width": 512})
    ],
}


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def changed(name: str = "guide", **nodes: Any) -> dict[str, Any]:
    """Return a workflow with inputs of nodes changed: `n5={"steps": 0}`; None removes one."""
    graph = workflow(name)
    for node, inputs in nodes.items():
        for key, value in inputs.items():
            if value is None:
                del graph[node[1:]]["inputs"][key]
            else:
                graph[node[1:]]["inputs"][key] = value
    return graph


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def requests(graph: Any) -> list[tuple[list[str], GenerateRequest]]:
    checked = checked_graph(graph, CATALOGUE)
    chains = chains_of(checked, CATALOGUE)
    assert not checked.node_errors
    return [
        (list(chain.outputs), request_of(chain, lambda file: False, with_previews=False))
        for chain in chains
    ]


def errors(graph: Any) -> dict[str, list[dict[str, Any]]]:
    """Return node id -> its errors."""
    checked = checked_graph(graph, CATALOGUE)
    for chain in chains_of(checked, CATALOGUE):
        try:
            request_of(chain, lambda file: file == "ink.safetensors", with_previews=False)
        except NodeError as error:
            return {error.node: [error.error]}
    return {name: told["errors"] for name, told in checked.node_errors.items()}


def kinds(graph: Any) -> dict[str, list[str]]:
    return {name: [each["type"] for each in told] for name, told in errors(graph).items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_workflow_becomes_the_requests_it_means(name: str):
    made = requests(workflow(name))
    assert [outputs for outputs, _ in made] == [outputs for outputs, _ in EXPECTED[name]]
    for (_, request), (_, fields) in zip(made, EXPECTED[name], strict=True):
        assert request.model_dump(include=set(fields)) == fields


def test_every_workflow_here_is_expected_to_do_something():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(EXPECTED)


def test_loras_have_the_strengths_of_their_loaders():
    ((_, request),) = requests(workflow("loras"))
    assert [(lora.name, lora.weight) for lora in request.loras] == [
        ("ink", 0.8),
        ("styles/film", 0.5),
    ]
    twice = changed("loras", n21={"lora_name": "ink.safetensors"})
    ((_, request),) = requests(twice)
    assert [(lora.name, lora.weight) for lora in request.loras] == [("ink", 1.3)]
    off = changed("loras", n20={"strength_model": 0, "strength_clip": 0})
    ((_, request),) = requests(off)
    assert [lora.name for lora in request.loras] == ["styles/film"]


def test_a_lora_with_another_strength_in_the_text_encoders_is_refused_if_it_adapts_them():
    unequal = changed("loras", n20={"strength_clip": 0.2})
    assert kinds(unequal) == {"20": ["not_supported_yet"]}
    ((_, request),) = requests(unequal)  # says that it does not
    assert request.loras[0].weight == 0.8


def test_zeros_as_the_whole_negative_hold_at_every_step():
    graph = workflow("guide") | {"8": node("ConditioningZeroOut", conditioning=["2", 0])}
    graph["5"]["inputs"]["negative"] = ["8", 0]
    ((_, request),) = requests(graph)
    assert request.negative_prompt_range == NEVER
    assert request.negative_prompt == ""


@pytest.mark.parametrize("denoise", [0.1, 0.25, 0.3, 0.37, 0.5, 0.6, 0.75, 0.8, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("scheduler", ["normal", "simple", "sgm_uniform"])
def test_denoise_makes_the_steps_that_comfyui_makes(denoise: float, scheduler: str):
    for steps in range(1, 60):
        schedule = int(steps / denoise)
        if schedule > 200:
            continue
        graph = changed("image_to_image", n3={"steps": steps, "denoise": denoise})
        ((_, request),) = requests(graph)
        asked = request.num_inference_steps or 0, request.strength or 0.0
        # comfy/samplers.py, KSampler.set_steps.
        expected = make_sigmas(scheduler, schedule, 3.0)[-(steps + 1) :]
        np.testing.assert_array_equal(make_sigmas(scheduler, asked[0], 3.0, asked[1]), expected)
        assert steps_taken(*asked) == steps


def test_a_denoise_of_one_takes_all_steps_of_its_picture():
    ((_, request),) = requests(changed("image_to_image", n3={"denoise": 1}))
    assert (request.num_inference_steps, request.strength) == (20, 1.0)


def test_start_images_that_cannot_be_used_are_refused_at_their_nodes():
    assert kinds(changed("image_to_image", n10={"image": "x.png"})) == {
        "10": ["custom_validation_failed"]
    }
    too_many = errors(changed("image_to_image", n3={"denoise": 0.05}))
    assert too_many["3"][0]["extra_info"]["input_name"] == "denoise"
    assert kinds(changed("image_to_image", n3={"denoise": 0})) == {"3": ["not_supported_yet"]}
    decoded = changed("image_to_image", n12={"pixels": ["8", 0]})
    assert kinds(decoded) == {"12": ["not_supported_yet"]}


RANGES: dict[str, dict[str, Any]] = {
    "nothing in the middle": {"n68": {"start": 0.3}},
    "both at once": {"n68": {"start": 0.05}},
    "a text without its zeros": {"n68": {"end": 0.9}},
    "two texts": {"n68": {"conditioning": ["6", 0]}},
}


@pytest.mark.parametrize("change", RANGES.values(), ids=list(RANGES))
def test_other_mixtures_of_negatives_are_refused(change: dict[str, Any]):
    told = errors(changed("makers_negative_range", **change))
    assert [(name, each[0]["type"]) for name, each in told.items()] == [("69", "not_supported_yet")]
    assert "ConditioningZeroOut" in told["69"][0]["details"]


@pytest.mark.parametrize(("first", "second"), [("70", "68"), ("68", "70")])
def test_a_negative_may_hold_late_and_in_either_order(first: str, second: str):
    graph = changed(
        "makers_negative_range",
        n68={"conditioning": ["71", 0]},
        n70={"conditioning": ["67", 0]},
        n69={"conditioning_1": [first, 0], "conditioning_2": [second, 0]},
    )
    ((_, request),) = requests(graph)
    assert request.negative_prompt_range == (0.1, 1.0)


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


def test_what_is_done_otherwise_is_said():
    warnings = {
        name: chains_of(checked_graph(workflow(name), CATALOGUE), CATALOGUE)[0].warnings
        for name in EXPECTED
    }
    assert any("(word:1.2)" in each for each in warnings["split_files_tiled"])
    assert any("text encoders" in each for each in warnings["split_files_tiled"])
    assert any("empty_padding" in each for each in warnings["medium_three_texts"])
    assert warnings["guide"] == []


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
    st.sampled_from(sorted(EXPECTED)),
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
