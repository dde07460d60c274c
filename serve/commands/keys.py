"""`kelvin keys`: API keys are made, listed and revoked where the service looks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from serve.commands.output import EXIT_OK, console, write_json
from serve.commands.overrides import settings_from_options
from serve.errors import InvalidRequest, KeyNotFound
from serve.key_ring import REVOKED_WITHIN_S
from serve.key_store import KeyStore, key_store
from serve.keys import KeyRecord, new_key, without_keys
from serve.tenants import ROLES, Role, checked_tenant

_LONGEST_LABEL = 200


def create(
    *,
    tenant: str,
    roles: Sequence[str],
    label: str,
    config: Path | None,
    assignments: Iterable[str],
    as_json: bool,
) -> int:
    """Make a key and print it.

    Raises:
        InvalidRequest: Tenant, role or label are none.
        KelvinError: The keys cannot be reached.
    """
    checked_tenant(tenant)
    allowed: tuple[Role, ...] = tuple(role for role in ROLES if role in roles)
    if unknown := set(roles) - set(ROLES):
        raise InvalidRequest(
            "There is no such role.",
            field="role",
            value=", ".join(sorted(unknown)),
            allowed=f"one or several of: {', '.join(ROLES)}",
        )
    if len(label) > _LONGEST_LABEL:
        raise InvalidRequest(
            "The label is too long.",
            field="label",
            value=label,
            allowed=f"at most {_LONGEST_LABEL} characters",
        )
    key, record = new_key(tenant, allowed, label)
    asyncio.run(_store(config, assignments).add(record))
    if as_json:
        write_json({"key": key, **_shown(record)})
    else:
        console().print(f"Key {record.id} of tenant {tenant}. It is shown this once:")
        print(key)
    return EXIT_OK


def list_keys(*, config: Path | None, assignments: Iterable[str], as_json: bool) -> int:
    """Show what is kept of every key.

    Raises:
        KelvinError: The keys cannot be reached.
    """
    found = asyncio.run(_store(config, assignments).records())
    records = sorted(found.values(), key=lambda record: (record.tenant, record.created_at))
    if as_json:
        write_json({"keys": [_shown(record) for record in records]})
        return EXIT_OK
    table = Table(show_lines=False, pad_edge=False)
    for heading in ("id", "tenant", "roles", "created", "label"):
        table.add_column(heading, overflow="fold")
    for record in records:
        shown = _shown(record)
        row = (record.id, record.tenant, ", ".join(record.roles), shown["created"], record.label)
        table.add_row(*row)
    console().print(table)
    return EXIT_OK


def revoke(key_id: str, *, config: Path | None, assignments: Iterable[str], as_json: bool) -> int:
    """Take a key back.

    Raises:
        KeyNotFound: No key has this id.
        KelvinError: The keys cannot be reached.
    """

    async def remove(store: KeyStore) -> KeyRecord:
        record = _found(await store.records(), key_id)
        await store.remove(record.digest)
        return record

    record = asyncio.run(remove(_store(config, assignments)))
    if as_json:
        write_json({"revoked": record.id})
    else:
        console().print(
            f"Revoked {record.id} of tenant {record.tenant}; it counts no more within "
            f"{REVOKED_WITHIN_S:g} s."
        )
    return EXIT_OK


def _found(records: Mapping[str, KeyRecord], key_id: str) -> KeyRecord:
    for record in records.values():
        if key_id in (record.id, record.digest):
            return record
    raise KeyNotFound(
        "No API key has this id.",
        field="id",
        value=without_keys(key_id),  # somebody may have typed the key itself
        allowed="an id that `kelvin keys list` shows",
    )


def _store(config: Path | None, assignments: Iterable[str]) -> KeyStore:
    return key_store(settings_from_options(config, assignments))


def _shown(record: KeyRecord) -> dict[str, Any]:
    created = datetime.fromtimestamp(record.created_at, UTC)
    return {
        "id": record.id,
        "tenant": record.tenant,
        "roles": list(record.roles),
        "label": record.label,
        "created": created.isoformat(timespec="seconds"),
    }
