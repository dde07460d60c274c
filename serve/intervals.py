"""A pair of numbers from 0 to 1, the first below the second, as callers write it."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _tuple(value: Any) -> Any:
    # JSON has no tuples, and strict validation takes nothing else. Told here, because pydantic's
    # own words speak of tuples.
    if not isinstance(value, list | tuple) or len(value) not in (1, 2):
        raise PydanticCustomError("not_a_pair", "Input should be two numbers in a list")
    return tuple(value)


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise PydanticCustomError("not_rising", "The first number must be below the second")
    return pair


_Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]

Interval = Annotated[tuple[_Share, _Share], BeforeValidator(_tuple), AfterValidator(_rising)]
"""`[low, high]`, 0 <= low < high <= 1."""
