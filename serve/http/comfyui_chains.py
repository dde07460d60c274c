"""What a checked workflow asks for: each KSampler with its outputs is one request of Kelvin.

A chain is read backwards from its outputs: picture, latents, sampler, then model, conditioning and
empty latents. What ComfyUI can wire up and Kelvin cannot make is refused at the node where it
begins, with what would work instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from serve.errors import InvalidRequest
from serve.http.comfyui_conditioning import negative_fields, positive_text
from serve.http.comfyui_files import TEMP_PREFIX, checked_prefix
from serve.http.comfyui_graph import Graph, Link, Node, NodeError, not_yet
from serve.http.comfyui_nodes import PRIMITIVES, SAMPLERS, Catalogue

_WEIGHTED = re.compile(r"\([^()]*:\s*-?\d|\bembedding:")
_MOST_STEPS = 200  # of a request
_ALL_OF_IT = 0.9999  # a denoise above this is 1: comfy/samplers.py, KSampler.set_steps
_ENCODERS_OF: Final = {"CLIPLoader": 1, "DualCLIPLoader": 2}
_WEIGHTS_ARE_TEXT = "Weights such as (word:1.2) and embeddings in a prompt are read as plain text."
_ALL_ENCODERS = "All three text encoders of the served model are used, whatever the loader names."
_PADDING = "empty_padding 'none': an empty text is encoded as one all the same."


@dataclass(frozen=True)
class LoraStrength:
    """A LoRA as a chain loads it.

    Attributes:
        file: Its file name.
        model: Strength in the transformer.
        clip: Strength in the text encoders; None: it is not loaded there.
        node: Id of the loader.
    """

    file: str
    model: float
    clip: float | None
    node: str


@dataclass
class Chain:
    """One KSampler with all outputs that show its pictures.

    Attributes:
        sampler: Id of the KSampler.
        encoder: Id of the node that encodes the prompt.
        decoder: Id of the node that decodes.
        outputs: Id of each output node -> prefix of its files' names.
        fields: Of the request.
        sources: Field of the request -> node and input that it comes from.
        loras: In the order in which they are loaded.
        warnings: What is done otherwise than in ComfyUI.
    """

    sampler: str
    encoder: str = ""
    decoder: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    loras: list[LoraStrength] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def take(self, name: str, value: Any, node: str, source: str) -> None:
        """Set a field of the request, and say where it comes from."""
        self.fields[name] = value
        self.sources[name] = node, source


def chains_of(graph: Graph, catalogue: Catalogue) -> list[Chain]:
    """Return the chains of a graph's outputs; outputs that cannot be made move to its errors."""
    chains: dict[str, Chain] = {}
    types = {node.id: node.class_type for node in graph.nodes.values()}
    for output in list(graph.outputs):
        try:
            decoder, sampler = _sampler_of(graph, output)
            reader = _Reader(graph, catalogue)
            chain = chains.get(sampler) or reader.chain(sampler, decoder)
            chain.outputs[output] = reader.prefix(output, chain)
            chains[sampler] = chain
        except NodeError as error:
            graph.refuse(output, {error.node: [error.error]}, types)
    return list(chains.values())


def _sampler_of(graph: Graph, output: str) -> tuple[str, str]:
    decoder = _linked(graph, graph.nodes[output], "images")
    if decoder.class_type not in ("VAEDecode", "VAEDecodeTiled"):
        raise not_yet(
            output, f"Pictures of {decoder.class_type}", "pictures that a VAEDecode decodes"
        )
    sampler = _linked(graph, decoder, "samples")
    if sampler.class_type != "KSampler":
        raise not_yet(
            decoder.id, f"Decoding what {sampler.class_type} gives", "samples of a KSampler"
        )
    return decoder.id, sampler.id


def _linked(graph: Graph, node: Node, name: str) -> Node:
    link = node.inputs[name]
    return graph.nodes[link.node]


def _walk(graph: Graph, node: Node, name: str) -> Iterator[Node]:
    """Yield the nodes behind an input, as long as each has an input of that name.

    Raises:
        NodeError: They go round in a circle.
    """
    seen = {node.id}
    while isinstance(link := node.inputs.get(name), Link):
        node = graph.nodes[link.node]
        if node.id in seen:
            raise NodeError(node.id, "dependency_cycle", "Dependency cycle detected", name)
        seen.add(node.id)
        yield node


class _Reader:
    """Reads one chain."""

    def __init__(self, graph: Graph, catalogue: Catalogue) -> None:
        self._graph = graph
        self._catalogue = catalogue

    def chain(self, sampler_id: str, decoder: str) -> Chain:
        """Return a chain without its outputs.

        Raises:
            NodeError: It cannot be made.
        """
        sampler = self._graph.nodes[sampler_id]
        chain = Chain(sampler_id, decoder=decoder)
        for name, source in (
            ("seed", "seed"),
            ("num_inference_steps", "steps"),
            ("guidance_scale", "cfg"),
            ("scheduler", "scheduler"),
        ):
            chain.take(name, self._value(sampler, source), sampler.id, source)
        asked = str(self._value(sampler, "sampler_name"))
        chain.take("sampler", SAMPLERS.get(asked, asked), sampler.id, "sampler_name")
        self._model(chain, sampler)
        self._conditioning(chain, sampler)
        self._latents(chain, sampler)
        return chain

    def prefix(self, output: str, chain: Chain) -> str:
        """Return what the names of an output's files begin with.

        Raises:
            NodeError: They would lie elsewhere.
        """
        node = self._graph.nodes[output]
        if "filename_prefix" not in node.inputs:
            return TEMP_PREFIX
        prefix = str(self._value(node, "filename_prefix"))
        try:
            return checked_prefix(prefix, chain.fields)
        except InvalidRequest as error:
            raise NodeError(
                output,
                "custom_validation_failed",
                error.message,
                f"filename_prefix: {error.allowed}",
                input_name="filename_prefix",
                received_value=error.value,
                allowed=error.allowed,
            ) from None

    def _value(self, node: Node, name: str) -> Any:
        """Return an input's value, a primitive's where it is linked."""
        value = node.inputs[name]
        if not isinstance(value, Link):
            return value
        primitive = self._graph.nodes[value.node]
        if primitive.class_type not in PRIMITIVES:
            raise not_yet(node.id, f"Input {name} from {primitive.class_type}", "a primitive")
        if isinstance(primitive.inputs["value"], Link):
            raise not_yet(primitive.id, "A primitive that takes a link", "a value")
        return primitive.inputs["value"]

    def _model(self, chain: Chain, sampler: Node) -> None:
        for node in _walk(self._graph, sampler, "model"):
            if node.class_type == "ModelSamplingSD3":
                # The one nearest to the sampler is applied last.
                if "shift" not in chain.fields:
                    chain.take("shift", self._value(node, "shift"), node.id, "shift")
            elif node.class_type.startswith("LoraLoader"):
                strength = self._value(node, "strength_model")
                file = str(self._value(node, "lora_name"))
                chain.loras.insert(0, LoraStrength(file, strength, None, node.id))
        source = "unet_name" if node.class_type == "UNETLoader" else "ckpt_name"
        chain.take("model", self._model_name(node), node.id, source)

    def _model_name(self, loader: Node) -> str:
        source = "unet_name" if loader.class_type == "UNETLoader" else "ckpt_name"
        name = str(self._value(loader, source))
        model = self._catalogue.checkpoints.get(name)
        if model is None:  # by a primitive
            raise NodeError(
                loader.id, "value_not_in_list", "Value not in list", f"{source}: {name}"
            )
        return model

    def _same_model(self, chain: Chain, loader: Node) -> None:
        if loader.class_type != "CheckpointLoaderSimple":
            return
        other = self._model_name(loader)
        if other != chain.fields["model"]:
            raise not_yet(
                loader.id,
                f"Parts of {other} for {chain.fields['model']}",
                "one checkpoint for a chain's model, clip and vae",
            )

    def _conditioning(self, chain: Chain, sampler: Node) -> None:
        positive = positive_text(self._graph, sampler)
        chain.encoder = positive.id
        self._text(chain, positive, "")
        self._clip(chain, positive)
        if chain.fields["guidance_scale"] <= 1:
            if chain.fields["guidance_scale"] < 1:
                chain.warnings.append("A cfg below 1 runs without guidance, as 1 does.")
            return
        negative, held = negative_fields(self._graph, sampler, self._value)
        if negative is not None:
            self._text(chain, negative, "negative_")
            self._clip(chain, negative)
        if held is not None:
            chain.take("negative_prompt_range", held, sampler.id, "negative")

    def _text(self, chain: Chain, node: Node, prefix: str) -> None:
        if node.class_type == "CLIPTextEncode":
            texts = {"prompt": "text"}
        else:
            texts = {"prompt": "clip_l", "prompt_2": "clip_g", "prompt_3": "t5xxl"}
            empty = [name for name in texts.values() if not self._value(node, name)]
            if empty and self._value(node, "empty_padding") == "none":
                chain.warnings.append(_PADDING)
        for name, source in texts.items():
            text = str(self._value(node, source))
            chain.take(prefix + name, text, node.id, source)
            if _WEIGHTED.search(text) and _WEIGHTS_ARE_TEXT not in chain.warnings:
                chain.warnings.append(_WEIGHTS_ARE_TEXT)

    def _clip(self, chain: Chain, encoder: Node) -> None:
        """Take the strengths of LoRAs in the text encoders, the same for both prompts."""
        found: dict[str, float] = {}
        for node in _walk(self._graph, encoder, "clip"):
            if node.class_type == "LoraLoader":
                found[node.id] = self._value(node, "strength_clip")
        self._same_model(chain, node)
        if node.class_type in _ENCODERS_OF and _ALL_ENCODERS not in chain.warnings:
            chain.warnings.append(_ALL_ENCODERS)
        for index, lora in enumerate(chain.loras):
            clip = found.pop(lora.node, None)
            if encoder.id != chain.encoder and clip != lora.clip:
                raise not_yet(
                    encoder.id, "LoRAs in one prompt alone", "the same clip for both prompts"
                )
            chain.loras[index] = LoraStrength(lora.file, lora.model, clip, lora.node)
        for stray in found:
            raise not_yet(
                stray, "A LoRA in the text encoders alone", "its model as well as its clip"
            )

    def _latents(self, chain: Chain, sampler: Node) -> None:
        latents = _linked(self._graph, sampler, "latent_image")
        denoise = float(self._value(sampler, "denoise"))
        self._same_model(chain, _linked(self._graph, self._graph.nodes[chain.decoder], "vae"))
        if latents.class_type == "KSampler":
            raise not_yet(
                sampler.id, "A second KSampler in a chain", "one KSampler for each output"
            )
        if latents.class_type == "VAEEncode":
            self._start_image(chain, sampler, latents, denoise)
            return
        for name, source in (
            ("width", "width"),
            ("height", "height"),
            ("num_images", "batch_size"),
        ):
            chain.take(name, self._value(latents, source), latents.id, source)
        if denoise <= _ALL_OF_IT:
            raise not_yet(
                sampler.id,
                f"A denoise of {denoise:g} of empty latents",
                "denoise 1, or latents of VAEEncode and LoadImage",
            )

    def _start_image(self, chain: Chain, sampler: Node, encode: Node, denoise: float) -> None:
        """Take a start image, noised as far as ComfyUI would.

        `denoise` makes a schedule of int(steps / denoise) and takes its last `steps`
        (comfy/samplers.py, KSampler.set_steps): all of `steps` are made. `strength` is the share of
        `num_inference_steps` that is made (deployments.sd3.sigmas.steps_taken, as in diffusers), so
        the longer schedule is asked for, and the share that gives `steps` of it. Half a step less
        than steps / schedule keeps rounding from making it one more.
        """
        loaded = _linked(self._graph, encode, "pixels")
        if loaded.class_type != "LoadImage":
            raise not_yet(encode.id, f"Encoding what {loaded.class_type} gives", "a LoadImage")
        self._same_model(chain, _linked(self._graph, encode, "vae"))
        name = str(self._value(loaded, "image"))
        if name not in self._catalogue.images:  # by a primitive
            raise NodeError(loaded.id, "value_not_in_list", "Value not in list", f"image: {name}")
        chain.take("init_image", self._catalogue.images[name], loaded.id, "image")
        steps = chain.fields["num_inference_steps"]
        if denoise > _ALL_OF_IT:
            chain.take("strength", 1.0, sampler.id, "denoise")
            return
        if denoise <= 0 or not isinstance(steps, int):
            raise not_yet(sampler.id, f"A denoise of {denoise:g}", "a denoise above 0")
        if (longest := steps / denoise) >= _MOST_STEPS + 1:  # infinity, of the least of numbers
            raise NodeError(
                sampler.id,
                "custom_validation_failed",
                f"A denoise of {denoise:g} makes a schedule of {longest:.4g} steps",
                f"denoise: steps / denoise of at most {_MOST_STEPS}",
                input_name="denoise",
                field="num_inference_steps",
                received_value=denoise,
                allowed=f"steps / denoise of at most {_MOST_STEPS}",
            )
        schedule = int(longest)
        chain.take("num_inference_steps", schedule, sampler.id, "steps")
        chain.take("strength", (steps - 0.5) / schedule, sampler.id, "denoise")
