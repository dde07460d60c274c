"""ComfyUI workflows of tests/workflows, changed at will, and what they come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve.http.comfyui_chains import chains_of
from serve.http.comfyui_graph import NodeError, checked_graph
from serve.http.comfyui_nodes import Catalogue
from serve.http.comfyui_requests import request_of
from serve.requests import GenerateRequest

WORKFLOWS = Path(__file__).parents[1] / "workflows"

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


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
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
