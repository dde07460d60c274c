"""The keys by which the routing knows what a request wants and what a replica holds."""

from __future__ import annotations


def size_key(width: int, height: int) -> str:
    """Return the key of pictures of one size, in pixels: those share forwards."""
    return f"size {width}x{height}"


def lora_key(name: str) -> str:
    """Return the key of a LoRA, held by who has it in memory."""
    return f"lora:{name}"
