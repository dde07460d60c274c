"""The embedded store's own keys: drawn once, kept in its data folder, for its owner alone."""

from __future__ import annotations

import configparser
import json
import os
import secrets
from pathlib import Path

_PROFILE = "default"


def write_credentials(data_dir: Path) -> Path:
    """Draw the keys unless the folder has them, and tell SeaweedFS about them.

    Args:
        data_dir: Gets `credentials` (AWS shared-credentials format) and `s3.json`, both mode 0600.

    Returns:
        The path of `s3.json`.

    Raises:
        OSError: The folder cannot be written.
    """
    file = data_dir / "credentials"
    keys = configparser.ConfigParser(interpolation=None)
    if file.exists():
        keys.read(file, encoding="utf-8")
    if not keys.has_option(_PROFILE, "aws_secret_access_key"):
        access, secret = "kelvin" + secrets.token_hex(7), secrets.token_urlsafe(30)
        _write_private(
            file,
            f"[{_PROFILE}]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n",
        )
        keys.read(file, encoding="utf-8")
    identity = {
        "name": "kelvin",
        "credentials": [
            {
                "accessKey": keys[_PROFILE]["aws_access_key_id"],
                "secretKey": keys[_PROFILE]["aws_secret_access_key"],
            }
        ],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = data_dir / "s3.json"
    _write_private(config, json.dumps({"identities": [identity]}))
    return config


def _write_private(path: Path, text: str) -> None:
    """Write a file that nobody else can read at any moment, all of it or nothing."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
