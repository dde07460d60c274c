"""What a model folder says about itself: its name, defaults, limits and licence.

Read from JSON alone, without torch, so that the Pipeline can refuse a request before any stage
sees it. A `kelvin.json` beside `model_index.json` may state what the Diffusers files cannot:
`name`, `license`, `min_size` and `max_size` (pixels a side), and any field of `Defaults`. Beyond
`max_size`, which the table of positions ends at, `largest_side` lets who asks have larger pictures;
outside `trained_sides` ([shortest, longest]) pictures come with a warning. What else it says is for
others.
"""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serve.checkpoints.tensor_files import read_json
from serve.checkpoints.variants import DEFAULTS, variant_of
from serve.errors import ConfigurationError, InvalidRequest, ModelNotFound
from serve.requests import DEFAULT_STRENGTH, GenerateRequest, Sampler, Scheduler

STABILITY_LICENCE = (
    "Stability AI Community License: free for research and for organisations below 1 M USD of "
    "yearly revenue; above that an enterprise licence is needed (https://stability.ai/license)"
)
UNKNOWN_LICENCE = "not stated by the folder: see where the weights came from"

# Drawn seeds stay exact in JSON readers that keep numbers as doubles.
_SEEDS_DRAWN = 2**53
# Beyond four times the pixels of its own size a model repeats its subject instead of enlarging it.
_LARGEST_AREA_FACTOR = 4
_DEFAULT_T5_TOKENS = 256


class Defaults(BaseModel):
    """What a field left out of a request takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(ge=16, multiple_of=16)
    height: int = Field(ge=16, multiple_of=16)
    # Bounds as in requests: what a file states must be what a request may ask for.
    num_inference_steps: int = Field(28, ge=1, le=200)
    guidance_scale: float = Field(4.5, ge=0.0, le=100.0, allow_inf_nan=False)
    sampler: Sampler = "euler"
    scheduler: Scheduler = "normal"
    shift: float = Field(3.0, gt=0.0, le=100.0, allow_inf_nan=False)
    max_sequence_length: int = Field(_DEFAULT_T5_TOKENS, ge=1, le=512)


class ModelSpec(BaseModel):
    """One model: what requests may ask of it. Sizes in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    licence: str
    defaults: Defaults
    latent_channels: int
    size_multiple: int = Field(description="width and height are multiples of this")
    smallest_side: int
    largest_width: int
    largest_height: int
    largest_area: int = Field(description="largest width x height")
    trained_sides: tuple[int, int] | None = Field(
        None, description="shortest and longest side that training saw; null: not known"
    )

    @classmethod
    def from_directory(cls, path: Path, name: str | None = None) -> "ModelSpec":
        """Read a folder in Diffusers layout.

        Args:
            path: Folder with `model_index.json`.
            name: Name callers use; `kelvin.json`'s or the folder's own if None.

        Raises:
            ConfigurationError: A file is missing or says something else than SD3.5 does.
        """
        read_json(path / "model_index.json")
        transformer = read_json(path / "transformer" / "config.json")
        vae = read_json(path / "vae" / "config.json")
        own_file = path / "kelvin.json"
        own = read_json(own_file) if own_file.exists() else {}
        name = name or own.get("name") or path.resolve().name

        try:
            scale = 2 ** (len(vae["block_out_channels"]) - 1)
            patch_pixels = int(transformer["patch_size"]) * scale
            multiple = max(16, patch_pixels)
            # The table of position embeddings ends there; a model may be worse than its table.
            largest_side = int(transformer["pos_embed_max_size"]) * patch_pixels
            largest_side = min(largest_side, int(own.get("max_size", largest_side)))
            side = int(transformer["sample_size"]) * scale
            largest_area = min(largest_side**2, _LARGEST_AREA_FACTOR * side**2)
            if own.get("largest_side") is not None:
                largest_side = int(own["largest_side"])
                largest_area = largest_side**2
            defaults = Defaults(
                **{
                    "width": side,
                    "height": side,
                    "shift": _shift(path),
                    "max_sequence_length": _t5_tokens(path),
                    **_makers_defaults(transformer, name),
                    **{name: own[name] for name in Defaults.model_fields if name in own},
                }
            )
            return cls(
                name=name,
                licence=own.get("license") or _licence(transformer),
                defaults=defaults,
                latent_channels=int(transformer["in_channels"]),
                size_multiple=multiple,
                smallest_side=max(multiple, int(own.get("min_size", multiple))),
                largest_width=largest_side,
                largest_height=largest_side,
                largest_area=largest_area,
                trained_sides=own.get("trained_sides"),
            )
        except (KeyError, TypeError, ValueError, OverflowError, ValidationError) as error:
            raise ConfigurationError(
                f"The model folder's configuration cannot be used: {error!r}",
                field="model.path",
                value=str(path),
                allowed="a folder of Stable Diffusion 3.5's architecture in Diffusers layout",
            ) from None

    @field_validator("name", "licence")
    @classmethod
    def _can_be_said(cls, text: str) -> str:
        text.encode()  # of a file's name, or of JSON, it may be no Unicode: no answer could hold it
        return text

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        """Fill in what the request left out and check what only the model knows.

        Returns:
            The request with every field of `Defaults`, the model's name and a seed. Sending it
            again asks for the same pictures.

        Raises:
            ModelNotFound: It asks for another model.
            InvalidRequest: A size beyond the model's limits.
        """
        if request.model not in (None, self.name):
            raise model_not_found(str(request.model), (self.name,))
        filled: dict[str, Any] = {
            name: value
            for name, value in self.defaults.model_dump().items()
            if getattr(request, name) is None
        }
        filled["model"] = self.name
        if request.init_image is not None and request.strength is None:
            filled["strength"] = DEFAULT_STRENGTH
        if request.seed is None:
            filled["seed"] = secrets.randbelow(_SEEDS_DRAWN)
        resolved = request.model_copy(update=filled)
        self._check_size(resolved)
        return resolved

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        """Return what a resolved request should be told of its pictures."""
        sides = (request.width or 0, request.height or 0)
        least, most = self.trained_sides or (0, max(sides))
        if least <= min(sides) and max(sides) <= most:
            return ()
        return (
            f"Model {self.name!r} was trained at sides from {least} to {most} pixels: a picture of "
            f"{sides[0]} x {sides[1]} may not show what was asked.",
        )

    def _check_size(self, request: GenerateRequest) -> None:
        width, height = request.width or 0, request.height or 0
        area = f"width x height at most {self.largest_area} pixels"
        for field, value, largest in (
            ("width", width, self.largest_width),
            ("height", height, self.largest_height),
        ):
            allowed = f"a multiple of {self.size_multiple} from {self.smallest_side} to {largest}"
            if value % self.size_multiple or not self.smallest_side <= value <= largest:
                raise InvalidRequest(
                    f"Field {field!r}: model {self.name!r} cannot draw {value} pixels.",
                    field=field,
                    value=value,
                    allowed=f"{allowed}, {area}",
                )
        if width * height > self.largest_area:
            raise InvalidRequest(
                f"{width} x {height} pixels are too many for model {self.name!r}.",
                field="width" if width >= height else "height",
                value=max(width, height),
                allowed=area,
            )


def model_not_found(name: str, known: Iterable[str]) -> ModelNotFound:
    """Return the error for a model that is not served, naming those that are."""
    return ModelNotFound(
        f"There is no model {name!r} here.",
        field="model",
        value=name,
        allowed=f"one of: {', '.join(known)}",
    )


def _shift(path: Path) -> float:
    scheduler = path / "scheduler" / "scheduler_config.json"
    return float(read_json(scheduler).get("shift", 3.0)) if scheduler.exists() else 3.0


def _t5_tokens(path: Path) -> int:
    tokenizer = path / "tokenizer_3" / "tokenizer_config.json"
    longest = read_json(tokenizer).get("model_max_length") if tokenizer.exists() else None
    # Tokenizers without a limit state an astronomically large one.
    usable = isinstance(longest, int) and 1 <= longest < _DEFAULT_T5_TOKENS
    return int(longest) if usable and longest is not None else _DEFAULT_T5_TOKENS


def _makers_defaults(transformer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return Stability's own reference settings for the models that are recognised."""
    variant, _ = variant_of(transformer, name)
    return {} if variant is None else DEFAULTS[variant]


def _licence(transformer: Mapping[str, Any]) -> str:
    variant, _ = variant_of(transformer)
    return UNKNOWN_LICENCE if variant is None else STABILITY_LICENCE
