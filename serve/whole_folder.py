"""A folder that several processes may write at a time, and that is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give an empty folder beside the target, which is renamed to it once it has been filled.

    Args:
        target: That is not there yet; its parents are made. Where another process is first, its
            folder stays, and what was written here goes.

    Raises:
        OSError: It cannot be written, and nobody else has written it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(suffix=".tmp", dir=target.parent))
    try:
        yield partial
        partial.rename(target)
    except OSError:
        # Another process of this node was first; any other reason leaves no target.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
