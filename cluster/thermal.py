"""What a card's heat is read from: NVML, or a script of readings in a rehearsal."""

from __future__ import annotations

from cluster.heat_reading import THROTTLING, HeatSource, Reading
from cluster.nvml_card import NvmlCard
from cluster.scripted_heat import ScriptedHeat
from serve.config import ThermalSettings

__all__ = ["THROTTLING", "HeatSource", "NvmlCard", "Reading", "ScriptedHeat", "open_source"]


def open_source(
    device_uuid: str | None, settings: ThermalSettings, *, pool: str = ""
) -> HeatSource | None:
    """Return the source of readings that the settings ask for, or None where nothing is read.

    Args:
        device_uuid: Of the card, as CUDA calls it. None: there is none, as on a CPU, and only a
            script can tell anything.
        settings: Section `thermal`.
        pool: Of the replica that reads; a script may tell pools apart.

    Raises:
        ConfigurationError: The script cannot be read or is wrong.
    """
    if settings.source == "scripted" and settings.script is not None:
        return ScriptedHeat(settings.script, pool=pool)
    if settings.source == "nvml" and device_uuid is not None:
        return NvmlCard(device_uuid)
    return None
