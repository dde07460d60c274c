"""How much room a denoiser gives LoRAs, settled when it starts."""

from __future__ import annotations

import torch

from deployments.lora_files import LoraFiles
from deployments.lora_shelf import LoraShelf
from deployments.sd3.lora_arena import pages_of
from deployments.sd3.mmdit import Mmdit
from serve.errors import ConfigurationError
from serve.lora_settings import LoraSettings
from serve.loras import LoraLibrary


def lora_shelf(mmdit: Mmdit, library: LoraLibrary, settings: LoraSettings) -> LoraShelf | None:
    """Take memory for LoRAs if any may come.

    Args:
        mmdit: Loaded, nothing prepared yet.
        library: Of the model.
        settings: How many ranks.

    Returns:
        What holds them; None: no room, by the settings or since there are none.

    Raises:
        ConfigurationError: There is no memory for so many ranks.
    """
    pages = pages_of(library.room)
    if not pages:
        return None
    try:
        arena = mmdit.make_room_for_loras(pages)
    except torch.OutOfMemoryError:
        need = pages * mmdit.lora_page_bytes() / 2**30
        raise ConfigurationError(
            f"LoRAs of {16 * pages} ranks take {need:.1f} GiB, and the card has not so much left.",
            field="lora.ranks",
            value=settings.ranks,
            allowed="fewer ranks, 0 for none, or a larger card",
        ) from None
    return LoraShelf(arena, LoraFiles(library, arena))
