"""An error as ComfyUI's clients read it (`server.py`, post_prompt)."""

from __future__ import annotations

from typing import Any

from serve.errors import KelvinError


class PromptError(KelvinError):
    """The prompt as a whole cannot be taken.

    Args:
        kind: ComfyUI's type of the error.
        message: What went wrong.
        details: What would have been right, or where.
        node_errors: What is wrong with which node.
        **extra: ComfyUI's extra_info.
    """

    status = 400
    code = "prompt_refused"

    def __init__(
        self,
        kind: str,
        message: str,
        details: str = "",
        node_errors: dict[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message, field="prompt", allowed=details)
        self._comfyui = {
            "error": {"type": kind, "message": message, "details": details, "extra_info": extra},
            "node_errors": node_errors or {},
        }

    def comfyui_body(self) -> dict[str, Any]:
        """Return the body of ComfyUI's answer."""
        return self._comfyui


def comfyui_body(error: KelvinError) -> dict[str, Any]:
    """Return the body of an error at ComfyUI's routes."""
    if isinstance(error, PromptError):
        return error.comfyui_body()
    told = error.body()["error"]
    return {
        "error": {
            "type": told["code"],
            "message": told["message"],
            "details": told["allowed"] or "",
            "extra_info": {name: told[name] for name in ("field", "value", "allowed", "code")},
        },
        "node_errors": {},
    }
