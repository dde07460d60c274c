"""Settings of who may come in: addresses, API keys."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from pydantic import Field, field_validator

from serve.heat_settings import Section


class HttpSettings(Section):
    """Where the front doors listen, and to whom."""

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; on any but a loopback one every request needs an API "
        "key, `kelvin keys create` makes them",
    )
    port: int = Field(8000, ge=0, le=65_535, description="0 takes a free port")
    open_to_all: bool = Field(
        False, description="true: whoever reaches the address needs no key and may do everything"
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="further names by which browsers reach it: a Host or Origin without a key, or "
        "behind a proxy that changes Host, is refused otherwise",
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if any(not host or set(host) & set("/:@* ") for host in hosts):
            raise ValueError("names without scheme, port or wildcard, such as kelvin.example.org")
        return tuple(host.lower() for host in hosts)


class KeySettings(Section):
    """Where records of API keys lie; of the keys themselves only digests are kept."""

    file: str | None = Field(
        None,
        description="a file, the same on every node of a Pipeline; if absent the journal's store, "
        "or keys.json in the embedded store's folder",
    )
