"""LoRA files as a denoiser's shelf takes them: found, checked, read and laid out in pages."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.payloads import LoraUse
from deployments.sd3.lora_arena import HostPage, LoraArena, pages_of
from deployments.sd3.lora_tensors import read_layers
from serve.loras import LoraLibrary


class LoraFiles:
    """The source of a `LoraShelf`.

    Args:
        library: Where files are.
        arena: Whose pages they are laid out for.
    """

    def __init__(self, library: LoraLibrary, arena: LoraArena) -> None:
        self._library = library
        self._arena = arena

    def pages(self, use: LoraUse) -> int:
        """Return the pages that a file takes, from its header.

        Raises:
            InvalidRequest: It cannot be used here.
        """
        file, _ = self._library.file(use.name)
        return pages_of(file.rank("transformer"))

    def read(self, use: LoraUse) -> Sequence[HostPage]:
        """Return the content of a file's pages.

        Raises:
            InvalidRequest: It cannot be used here.
        """
        file, _ = self._library.file(use.name)
        return self._arena.pack(read_layers(file, file.of("transformer")))
