"""All doors for other services' clients, and the page: a new one is entered here.

Where it has a body of its own for errors, `serve.http.error_shapes` names that too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from serve.http.a1111 import web_ui_routes
from serve.http.comfyui import add_comfyui
from serve.http.openai import add_openai_routes
from serve.http.page import add_page
from serve.http.session import add_session
from serve.key_ring import KeyRing

if TYPE_CHECKING:
    from serve.pipeline import Pipeline


def add_doors(app: FastAPI, pipeline: Pipeline, keys: KeyRing) -> None:
    """Give an app every door's routes.

    Args:
        app: Behind its gate.
        pipeline: That makes the pictures.
        keys: Of the gate, for the page's login.
    """
    add_page(app)
    add_session(app, keys)
    add_openai_routes(app, pipeline, pipeline.settings.pipeline.max_body_bytes)
    add_comfyui(app, pipeline)
    app.include_router(web_ui_routes(pipeline))
