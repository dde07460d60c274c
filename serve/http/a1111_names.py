"""What AUTOMATIC1111 calls the samplers and schedulers that Kelvin has."""

from __future__ import annotations

from typing import Final, TypeVar

from serve.errors import InvalidRequest
from serve.requests import Sampler, Scheduler

_Name = TypeVar("_Name", bound=str)

SAMPLERS: Final[dict[Sampler, tuple[str, tuple[str, ...]]]] = {
    "euler": ("Euler", ("k_euler",)),
    "euler_ancestral": ("Euler a", ("k_euler_a", "k_euler_ancestral")),
    "dpmpp_2m": ("DPM++ 2M", ("k_dpmpp_2m",)),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", ("k_dpmpp_2m_sde",)),
}
"""Kelvin's name -> the name in the web UI, and its aliases (modules/sd_samplers_kdiffusion.py)."""

SCHEDULERS: Final[dict[Scheduler, str]] = {
    "normal": "Normal",
    "simple": "Simple",
    "sgm_uniform": "SGM Uniform",
    "beta": "Beta",
}
"""Kelvin's name, which is the web UI's too, -> the label there (modules/sd_schedulers.py)."""

_AUTOMATIC: Final = "automatic"


def sampler_named(name: str, field: str) -> Sampler:
    """Return the sampler of this name or alias, whatever its capitals.

    Raises:
        InvalidRequest: There is none.
    """
    wanted = name.strip().lower()
    for sampler, (label, aliases) in SAMPLERS.items():
        if wanted in (sampler, label.lower(), *aliases):
            return sampler
    raise InvalidRequest(
        f"There is no sampler {name!r}.",
        field=field,
        value=name,
        allowed="one of: " + ", ".join(label for label, _ in SAMPLERS.values()),
    )


def scheduler_named(name: str, field: str) -> Scheduler | None:
    """Return the scheduler of this name or label; None for `Automatic`: the model's own.

    Raises:
        InvalidRequest: There is none.
    """
    wanted = name.strip().lower()
    if wanted == _AUTOMATIC:
        return None
    for scheduler, label in SCHEDULERS.items():
        if wanted in (scheduler, label.lower()):
            return scheduler
    raise InvalidRequest(
        f"There is no scheduler {name!r}.",
        field=field,
        value=name,
        allowed="one of: Automatic, " + ", ".join(SCHEDULERS.values()),
    )
