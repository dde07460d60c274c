"""Where Kelvin keeps what it can make or fetch again, by the XDG Base Directory Specification."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Return Kelvin's folder in this user's cache; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kelvin"
