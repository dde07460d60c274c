"""`kelvin up`: check, start everything on this machine, serve until told to stop."""

from __future__ import annotations

import socket
from typing import Any, NoReturn

from serve.commands.finding import Finding
from serve.commands.model_files import check_model
from serve.commands.output import EXIT_OK, console, stdout_is_for_json, write_json
from serve.commands.stopping import Stop, end_process, local_kelvin, stoppable, wait_for_stop
from serve.commands.store_check import DURABLE_JOBS_OFF, check_store
from serve.config import Settings
from serve.errors import ConfigurationError, StorageUnavailable
from serve.storage_errors import shown_endpoint


def up(settings: Settings, *, as_json: bool) -> NoReturn:
    """Serve until SIGINT or SIGTERM, then stop every process that was started, and end this one.

    Raises:
        ConfigurationError: The port is taken, or the model cannot be read.
        StorageUnavailable: The store that is set does not do what Kelvin needs.
    """
    out = console()
    try:
        with stdout_is_for_json() as stdout, stoppable():
            check_before_start(settings)
            out.print("Starting Ray and the three stages ...")
            with local_kelvin(settings, may_join_cluster=True) as kelvin:
                if as_json:
                    write_json({"url": kelvin.url, **_facts(kelvin.settings)}, stdout)
                out.print(f"[green]Kelvin is up:[/] [bold]{kelvin.url}[/]  (docs at /docs)")
                out.print("Try, in another terminal:")
                out.print(
                    '  kelvin generate "a large red circle left of a small blue square"'
                    f" -o out.png --url {kelvin.url}",
                    soft_wrap=True,
                )
                out.print("Ctrl-C stops it.")
                wait_for_stop()
    except Stop:
        out.print("Stopped.")
    end_process(EXIT_OK)


def check_before_start(settings: Settings) -> None:
    """Run the checks whose failure is better heard before a minute of starting.

    Raises:
        ConfigurationError: The port is taken, or the model cannot be read.
        StorageUnavailable: The store that is set does not do what Kelvin needs.
    """
    _check_port(settings.http.host, settings.http.port)
    for model in (settings.model, *(entry.model for entry in settings.models)):
        _report(check_model(model))
    # The embedded store is started anyway and says itself what is wrong.
    if not settings.uses_embedded_store:
        _report(check_store(settings))
    elif not settings.journal.enabled:
        _report([DURABLE_JOBS_OFF])


def _report(findings: list[Finding]) -> None:
    for finding in findings:
        console().print(finding.line(), soft_wrap=True)
    for finding in findings:
        if finding.verdict == "failed":
            kind = StorageUnavailable if finding.name.startswith("store") else ConfigurationError
            raise kind(
                f"{finding.name}: {finding.detail}",
                field="storage" if kind is StorageUnavailable else "model.path",
                allowed=finding.remedy,
            )


def _check_port(host: str, port: int) -> None:
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        # As servers bind: a port whose last owner just left is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"Cannot listen on {host}:{port}: {error.strerror}.",
                field="http.port",
                value=port,
                allowed="a free port; --port 0 takes one",
            ) from None


def _facts(settings: Settings) -> dict[str, Any]:
    return {
        "model": settings.model.path,
        "bucket": settings.storage.bucket,
        "s3_endpoint": shown_endpoint(settings.storage.endpoint_url),
    }
