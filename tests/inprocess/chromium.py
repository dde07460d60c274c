"""Headless Chromium for tests of the page, and what no test of it may see."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# No GPU, no sandbox in containers, and nothing that would ask anybody else for anything.
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _executable() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


def missing() -> str | None:
    """Return why there is no browser here; None: there is one."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed: pip install -e '.[dev]'"
    return None if _executable() else "no Chromium here: apt-get install chromium"


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser; where there is none the test is skipped."""
    if why := missing():
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = _executable()
        browser = playwright.chromium.launch(executable_path=found, args=_ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any, url: str, key: str | None = None, refused: str = "", **options: Any
) -> Iterator[Any]:
    """Yield a page at a URL; what it complained of and whom it asked is checked at the end.

    Args:
        browser: From `chromium`.
        url: Of the service.
        key: It is logged in with; None: it is not.
        refused: The status that answers to it have on purpose, which Chromium writes down.
        options: Of the context: `viewport`, `color_scheme`, ...
    """
    context = browser.new_context(**options)
    if key is not None:
        context.add_cookies([{"name": "kelvin_key", "value": key, "url": url}])
    page = context.new_page()
    page.set_default_timeout(15_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"page: {error}"))
    page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    context.close()
    own = urlsplit(url).netloc
    grave = [
        each
        for each in complaints
        if each.startswith(("error", "warning", "page"))
        and not (refused and f"status of {refused}" in each)
    ]
    if grave:
        pytest.fail(f"the page complains: {grave}")
    hosts = {urlsplit(each).netloc for each in asked if not each.startswith("data:")}
    if hosts != {own}:
        pytest.fail(f"the page asks others than {own}: {hosts}")


def until(page: Any, expression: str, within_s: float = 15.0) -> None:
    """Wait until JavaScript is true; Playwright's own way needs what the page's policy forbids."""
    deadline = time.monotonic() + within_s
    while not page.evaluate(expression):
        if time.monotonic() > deadline:
            pytest.fail(f"it did not come about: {expression}")
        page.wait_for_timeout(20)
