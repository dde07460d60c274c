"""What was compiled since a moment: Triton kernels, torch.compile graphs, flash-attn-4 kernels.

A kernel that Triton finds on disk is loaded and not compiled; it is counted apart.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Counts:
    """Compilations in this process; None where the compiler is not installed."""

    triton: int | None
    triton_loaded: int | None  # met for the first time, found on disk
    dynamo_graphs: int
    inductor_graphs: int
    flash4: int | None

    @property
    def compiled(self) -> int:
        """All that was compiled, by whatever."""
        each = (self.triton, self.dynamo_graphs, self.inductor_graphs, self.flash4)
        return sum(count or 0 for count in each)

    def since(self, before: Counts) -> Counts:
        """Return what came after an earlier count."""
        now, then = asdict(self), asdict(before)
        spent: dict[str, Any] = {
            name: None if count is None else count - (then[name] or 0)
            for name, count in now.items()
        }
        return Counts(**spent)


class CompilationCounter:
    """Counts from its construction on; one a process, made before anything compiles."""

    def __init__(self) -> None:
        self._triton = self._triton_loaded = 0
        self.compiled_names: list[str] = []
        self._has_triton = self._listen()

    def counts(self) -> Counts:
        """Return the counts until now."""
        traced, lowered = _torch_compile()
        return Counts(
            triton=self._triton if self._has_triton else None,
            triton_loaded=self._triton_loaded if self._has_triton else None,
            dynamo_graphs=traced,
            inductor_graphs=lowered,
            flash4=_flash4(),
        )

    def _listen(self) -> bool:
        try:
            from triton import knobs
        except ImportError:
            return False
        before = knobs.compilation.listener

        # Called by `triton.compile`: for kernels compiled, and with `cache_hit` for those on disk.
        def listener(**event: Any) -> None:
            if event.get("cache_hit"):
                self._triton_loaded += 1
            else:
                self._triton += 1
                self.compiled_names.append(str(getattr(event.get("src"), "name", "?")))
            if before is not None:
                before(**event)

        knobs.compilation.listener = listener
        return True


def _torch_compile() -> tuple[int, int]:
    """Graphs that dynamo traced and that inductor compiled, in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported: nothing was compiled
    if dynamo is None:
        return 0, 0
    counters = dynamo.counters
    return int(counters["stats"]["unique_graphs"]), int(counters["inductor"]["fxgraph_cache_miss"])


def _flash4() -> int | None:
    interface = sys.modules.get("flash_attn.cute.interface")
    cache = getattr(getattr(interface, "_flash_attn_fwd", None), "compile_cache", None)
    cache = getattr(cache, "cache", cache)  # a dict, or an object around one
    try:
        return None if cache is None else len(cache)
    except TypeError:
        return None
