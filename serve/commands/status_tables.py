"""What `/v1/status` says, as tables for a terminal: pools, replicas, and how the rest stands.

Everything shown comes from outside, so it is text and never markup, and whatever is missing is
shown as missing: a service of another version may tell less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from serve.client_errors import UnexpectedAnswer

_ABSENT = "-"
# Of a margin, as the page has it: the card is about to slow down.
_HOT_C = 5.0
_WIDE = 110
"""Columns of a terminal from which on everything is shown."""
_CHROME_LINES = 8  # headings, borders and the summary
_FEWEST_REPLICAS = 3


@dataclass(frozen=True)
class _Service:
    model: str | None  # None: the service's own
    stages: Mapping[str, Any]
    autoscaling: Mapping[str, Any]


@dataclass(frozen=True)
class StatusView:
    """A status to be drawn as wide, and if asked as high, as the terminal is.

    Attributes:
        body: Of `/v1/status`.
        fits_height: Leave out the coolest replicas where there are too many to be seen.
    """

    body: Mapping[str, Any]
    fits_height: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        services = list(_services(self.body))
        replicas = _hottest_first(_replicas(services))
        is_wide = options.max_width >= _WIDE
        pools = _pools(services, replicas, is_wide=is_wide)
        shown = replicas
        if self.fits_height:
            free = options.size.height - _CHROME_LINES - pools.row_count
            shown = replicas[: max(free, _FEWEST_REPLICAS)]
        parts: list[RenderableType] = [_summary(self.body), pools]
        parts.append(_cards(shown, is_wide=is_wide))
        if len(shown) < len(replicas):
            parts.append(Text(f"the {len(shown)} hottest of {len(replicas)} replicas", "dim"))
        parts += [Text(warning, "yellow") for warning in _warnings(services)]
        yield Group(*parts)


def checked_status(answer: Any) -> dict[str, Any]:
    """Return an answer that is a status.

    Raises:
        UnexpectedAnswer: It is none.
    """
    if isinstance(answer, dict) and isinstance(answer.get("stages"), dict):
        return answer
    raise UnexpectedAnswer("The server does not say how its stages are.")


def _services(body: Mapping[str, Any]) -> Iterator[_Service]:
    yield _Service(None, _mapping(body.get("stages")), _mapping(body.get("autoscaling")))
    for name, told in _mapping(body.get("further_models")).items():
        further = _mapping(told)
        yield _Service(name, _mapping(further.get("stages")), _mapping(further.get("autoscaling")))


def _replicas(services: Sequence[_Service]) -> list[Mapping[str, Any]]:
    return [
        replica
        for service in services
        for found in service.stages.values()
        if isinstance(found, list)
        for replica in found
        if isinstance(replica, dict)
    ]


def _hottest_first(replicas: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    def margin(replica: Mapping[str, Any]) -> float:
        told = _mapping(replica.get("heat")).get("margin_c")
        return float(told) if _is_number(told) else float("inf")

    return sorted(replicas, key=margin)


def _warnings(services: Sequence[_Service]) -> list[str]:
    return [
        str(warning)
        for service in services
        for warning in service.autoscaling.get("warnings") or []
    ]


def _summary(body: Mapping[str, Any]) -> Text:
    pipeline, journal = _mapping(body.get("pipeline")), _mapping(body.get("journal"))
    spool = _mapping(body.get("spool"))
    said = Text()
    said.append(str(_mapping(body.get("model")).get("name", _ABSENT)), "bold")
    said.append(f"  jobs {_figure(pipeline.get('running_jobs'), 0)}")
    if _is_number(pipeline.get("joules")):
        said.append(f"  {_figure(pipeline['joules'] / 1e3, 1)} kJ")
    if not journal.get("durable"):
        said.append("  no journal", "yellow")
    elif not journal.get("lease_is_held"):
        said.append("  journal: lease lost", "bold red")
    used, limit = spool.get("used_bytes"), spool.get("limit_bytes")
    if _is_number(used) and _is_number(limit) and limit:
        waiting = spool.get("waiting_pictures") or 0
        said.append(
            f"  spool {used / limit:.0%}, {waiting} wait for the store", "yellow" if waiting else ""
        )
    return said


def _pools(
    services: Sequence[_Service], replicas: Sequence[Mapping[str, Any]], *, is_wide: bool
) -> Table:
    table = _table("pool", ">replicas", ">waits s", "why")
    for service in services:
        for name, told in _mapping(service.autoscaling.get("pools")).items():
            decided = _mapping(told)
            own = [replica for replica in replicas if replica.get("pool") == name]
            target = decided.get("target")
            count = str(len(own))
            if _is_number(target) and target != len(own):
                count += f" -> {target}"
            waits = [_mapping(replica.get("load")).get("waiting_s") for replica in own]
            known = [wait for wait in waits if _is_number(wait)]
            # Shared by the pool's replicas; in seconds of cool cards.
            mean = sum(known) / len(known) if known else None
            label = f"{name} ({service.model})" if service.model else name
            reason = str(decided.get("reason") or "")
            table.add_row(
                Text(label),
                Text(count, "" if own else "bold red"),
                Text(_figure(mean, 1)),
                Text(
                    reason, "dim", overflow="fold" if is_wide else "ellipsis", no_wrap=not is_wide
                ),
            )
    return table


def _cards(replicas: Sequence[Mapping[str, Any]], *, is_wide: bool) -> Table:
    wide = (">rows", ">duty", "node", "device") if is_wide else ()
    table = _table(
        "replica",
        ">queue",
        ">waits s",
        ">C",
        ">margin",
        ">W",
        *wide,
        *(("note",) if is_wide else ()),
    )
    for replica in replicas:
        load, heat = _mapping(replica.get("load")), _mapping(replica.get("heat"))
        pool, own_id = str(replica.get("pool", "?")), str(replica.get("replica", ""))
        margin = heat.get("margin_c")
        notes = _notes(load, heat)
        is_hot = bool(heat.get("throttled")) or (_is_number(margin) and margin < _HOT_C)
        cells = [
            pool if own_id in ("", pool) else f"{pool} {own_id[-8:]}",
            _figure(replica.get("queue_length"), 0),
            _figure(load.get("waiting_s"), 1),
            _figure(heat.get("temperature_c"), 0),
            _figure(margin, 0),
            _figure(heat.get("power_w"), 0),
        ]
        if is_wide:
            duty = load.get("duty")
            cells += [
                _figure(load.get("rows"), 0),
                f"{duty:.0%}" if _is_number(duty) else _ABSENT,
                str(replica.get("node", _ABSENT))[:8],
                str(replica.get("device", _ABSENT)),
                ", ".join(notes),
            ]
        elif heat.get("throttled"):
            cells[0] += " throttled"
        table.add_row(*(Text(cell) for cell in cells), style="bold red" if is_hot else None)
    return table


def _notes(load: Mapping[str, Any], heat: Mapping[str, Any]) -> list[str]:
    notes = [
        word
        for word, key in (("throttled", "throttled"), ("rehearsal", "scripted"))
        if heat.get(key)
    ]
    slowdown = load.get("slowdown")
    if _is_number(slowdown) and slowdown > 1.05:
        notes.append(f"{slowdown:.1f}x as slow as cool")
    if reason := _mapping(heat.get("governor")).get("reason"):
        notes.append(str(reason))
    return notes + [str(problem) for problem in heat.get("problems") or []]


def _table(*headings: str) -> Table:
    table = Table(pad_edge=False, expand=False)
    for heading in headings:
        if heading.startswith(">"):
            table.add_column(heading[1:], justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    return table


def _figure(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if _is_number(value) else _ABSENT


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
