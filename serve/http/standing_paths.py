"""Paths that are not a caller's work: what probes, pages and those who run the service ask."""

from __future__ import annotations

from typing import Final

from serve.http.page import PAGE_PATHS

PUBLIC: Final = frozenset({"/healthz", "/readyz", "/v1/session"}) | PAGE_PATHS
"""What probes ask, and what a browser needs to log in.

To who shows no key `/readyz` says yes or no and no more, and `/v1/session` that nobody is known.
"""
ADMIN: Final = frozenset({"/v1/status"})
"""What tells of other tenants or of the machines."""
SERVES_OWN: Final = frozenset({"/-/healthz", "/-/routes"})
"""What Serve's proxy answers by itself."""
