"""The pico model as a folder whose table of positions is the file's own.

Without the larger pictures that its kelvin.json promises: a single file cannot promise them, and
the table that is continued for them is not in any file.
"""

from __future__ import annotations

import json
from pathlib import Path

from deployments.builtin.pico import write_pico


def pico_as_stored(folder: Path) -> Path:
    """Write the model and return the folder."""
    write_pico(folder, seed=0)
    facts = folder / "kelvin.json"
    stated = json.loads(facts.read_text())
    del stated["largest_side"]
    facts.write_text(json.dumps(stated))
    return folder
