"""What ComfyUI workflows come to: requests that mean what the workflow does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deployments.sd3.sigmas import make_sigmas, steps_taken
from serve.http.comfyui_chains import chains_of
from serve.http.comfyui_conditioning import NEVER
from serve.http.comfyui_graph import checked_graph
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


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_workflow_becomes_the_requests_it_means(name: str):
    made = requests(workflow(name))
    assert [outputs for outputs, _ in made] == [outputs for outputs, _ in EXPECTED[name]]
    for (_, request), (_, fields) in zip(made, EXPECTED[name], strict=True):
        assert request.model_dump(include=set(fields)) == fields


def test_every_workflow_here_is_expected_to_do_something():
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(EXPECTED)


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
    assert kinds(changed("image_to_image", n3={"denoise": 5e-324})).keys() == {"3"}
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


def test_what_is_done_otherwise_is_said():
    warnings = {
        name: chains_of(checked_graph(workflow(name), CATALOGUE), CATALOGUE)[0].warnings
        for name in EXPECTED
    }
    assert any("(word:1.2)" in each for each in warnings["split_files_tiled"])
    assert any("text encoders" in each for each in warnings["split_files_tiled"])
    assert any("empty_padding" in each for each in warnings["medium_three_texts"])
    assert warnings["guide"] == []
