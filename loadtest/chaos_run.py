"""A Kelvin to be hurt, and a run of chaos on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.chaos_attack import Attack, SpreadKelvin, Target
from loadtest.chaos_load import Load
from loadtest.chaos_nodes import WorkerNodes
from loadtest.chaos_timeline import draw_timeline
from loadtest.chaos_verdict import Books, undisturbed_pictures
from loadtest.chaos_victims import Kind
from loadtest.overhead import machine
from loadtest.results import STDERR
from serve.config import Settings, StorageSettings, load_settings
from serve.embedded_store import EmbeddedStore

_LEASE_S = 6.0
_NODES = 2
# Each has room for about a third of the replicas; the head has room for all.
_CPUS_OF_A_NODE = 3


@contextmanager
def attackable(folder: Path) -> Iterator[Target]:
    """Yield a running Kelvin with two of everything on several nodes, and what can be hurt."""
    nodes = WorkerNodes(_NODES, _CPUS_OF_A_NODE)
    with (
        EmbeddedStore(folder / "store", "chaos") as store,
        SpreadKelvin(_settings(store, folder), nodes) as kelvin,
    ):
        yield Target(kelvin, store, nodes)


def _settings(store: EmbeddedStore, folder: Path) -> Settings:
    def pool(name: str) -> list[dict[str, Any]]:
        return [{"name": name, "num_replicas": 2, "torch_threads": 1}]

    return load_settings(
        overrides={
            "model": {"path": "pico"},
            "text_encoder": pool("text-encoder"),
            "denoiser": pool("denoiser"),
            "vae_decoder": pool("vae-decoder"),
            "pipeline": {"num_replicas": 2},
            "http": {"port": 0},
            "storage": store.storage_settings(StorageSettings()).model_dump(),
            "embedded_store": {"enabled": False},
            "journal": {"lease_s": _LEASE_S},
            "spool": {"directory": str(folder / "spool")},
        }
    )


def chaos(
    target: Target,
    number: int,
    *,
    at_once: int,
    rounds: int,
    kinds: tuple[Kind, ...],
    seed: int,
    limit_s: float,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Hurt it while it works and return the verdict.

    Args:
        target: What is hurt.
        number: Of jobs.
        at_once: Of them under way.
        rounds: How often each kind is hurt.
        kinds: What is hurt.
        seed: Of what is hurt when.
        limit_s: Seconds after which it is given up.
        plot: Where the timeline is drawn, if anywhere.
    """
    undisturbed = undisturbed_pictures(target.url)
    books = Books(target.storage)
    before = books.jobs()
    with Load(target.url, number, at_once) as load:
        attack = Attack(target, load, seed, say=STDERR.print)
        given_up = attack.run(rounds, kinds, limit_s)
        seconds = load.now
    found = books.verdict(load, before, undisturbed)
    if plot is not None:
        draw_timeline(load.samples, attack.strikes, plot)
    struck = {kind: sum(each.kind == kind for each in attack.strikes) for kind in kinds}
    return found | {
        "given_up": given_up,
        "struck": struck,
        "strikes": [each.as_json() for each in attack.strikes],
        "longest_without_an_end_s": round(load.longest_silence_s, 1),
        "seconds": round(seconds, 1),
        "ok": found["ok"] and given_up is None and min(struck.values(), default=0) >= rounds,
        "machine": machine(),
    }
