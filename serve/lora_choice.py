"""How a request names LoRAs: a list of names and weights."""

from itertools import islice
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

SUFFIX = ".safetensors"
MOST_LORAS = 8
LARGEST_WEIGHT = 10.0
LONGEST_NAME = 200


class LoraChoice(BaseModel):
    """One LoRA of a request, as in ComfyUI's LoraLoader and diffusers' set_adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=LONGEST_NAME, description="as /v1/status lists it")
    weight: float = Field(1.0, ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT, allow_inf_nan=False)


def _choices(value: Any) -> Any:
    if value is None:  # jobs journalled while the field was reserved say null
        return ()
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("not_loras", "Input should be a list of {name, weight}")
    # A name alone is what most want to write. One too many is refused, more need not be looked at.
    some = value[: MOST_LORAS + 1]
    return tuple(map(_choice, some))


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    most = len(LoraChoice.model_fields) + 1
    # Pydantic would list all unknown fields: of a body's hundred thousand for a second.
    return dict(islice(value.items(), most)) if isinstance(value, dict) else value


def _each_once(choices: tuple[LoraChoice, ...]) -> tuple[LoraChoice, ...]:
    # A name with its suffix is the same LoRA, and a LoRA has one weight.
    if len({choice.name.removesuffix(SUFFIX) for choice in choices}) < len(choices):
        raise PydanticCustomError("lora_twice", "The same LoRA is named twice")
    return choices


Loras = Annotated[
    tuple[LoraChoice, ...],
    Field(max_length=MOST_LORAS),
    BeforeValidator(_choices),
    AfterValidator(_each_once),
]
"""At most 8, each once."""
