"""Three nodes of their own address and kind of card; one is cut off, killed, and comes back.

Meanwhile a pool that is tied to labelled nodes grows onto the second one of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config import StorageSettings
from tests.processes.ray_nodes import Nodes, ray_nodes

pytestmark = pytest.mark.timeout(600)
_PLACED = {
    "H100": {"denoiser-h100", "pipeline", "decode-spare"},
    "L4": {"denoiser-spot", "text", "decode"},
    "A10G": {"denoiser-spot", "text-spare"},
}


@pytest.fixture
def nodes(tmp_path: Path, storage: StorageSettings) -> Iterator[Nodes]:
    with ray_nodes(tmp_path, storage) as made:
        yield made


def settings(nodes: Nodes) -> dict[str, Any]:
    def pool(name: str, **more: Any) -> dict[str, Any]:
        # Work waits for a pool that has lost its replicas as long as these should take to start.
        return {"name": name, "torch_threads": 1, "num_cpus": 0.1, "start_s": 3.0, **more}

    on_spot = {
        "label_selector": {"tests.kelvin/market": "spot"},
        "max_replicas_per_node": 1,
        "kind_speed": 1.0,  # as an H100's, so that half of the work goes there
        "min_replicas": 1,
        "max_replicas": 2,
    }
    on_head = {"label_selector": {"tests.kelvin/place": "head"}}
    return {
        "model": {"path": "pico"},
        "denoiser": [
            pool("denoiser-h100", accelerator_type="H100"),
            pool("denoiser-spot", **on_spot),
        ],
        "text_encoder": [
            pool("text", accelerator_type="L4"),
            pool("text-spare", accelerator_type="A10G"),
        ],
        "vae_decoder": [pool("decode", accelerator_type="L4"), pool("decode-spare", **on_head)],
        # Whatever comes is more than one replica should bear, and none goes for want of work.
        "autoscaling": {"target_wait_s": 0.1, "target_utilisation": 0.05, "scale_in_after_s": 900},
        "pipeline": {"num_cpus": 2},  # no other node has so many
        "http": {"host": nodes.there["H100"].address, "port": 0, "open_to_all": True},
        "storage": nodes.store.model_dump(mode="json"),
        "embedded_store": {"enabled": False},
        "spool": {"directory": str(nodes.folder / "spool")},
    }


def bring_up(nodes: Nodes) -> None:
    nodes.ray("H100", more=("--port=0", "--num-cpus=4", "--include-dashboard=false"))
    nodes.ray("L4", "A10G", more=("--num-cpus=1",))
    config = nodes.folder / "kelvin.yaml"
    config.write_text(yaml.safe_dump(settings(nodes)))
    nodes.environ["RAY_ADDRESS"] = nodes.address
    out = nodes.start("H100", "-m", "serve", "up", "--config", str(config), "--json", suffix=".out")
    nodes.until(lambda: "\n" in out.read_text(), "Kelvin serves")
    nodes.url = json.loads(out.read_text().splitlines()[0])["url"]


def test_pools_are_where_they_were_told_and_a_node_may_be_lost(nodes: Nodes):
    bring_up(nodes)
    placed = nodes.placed()
    spot = [card for card, pools in placed.items() if "denoiser-spot" in pools]
    assert spot in (["L4"], ["A10G"])
    placed[spot[0]].remove("denoiser-spot")
    assert placed == {card: pools - {"denoiser-spot"} for card, pools in _PLACED.items()}

    while nodes.placed() != _PLACED:  # the pool grows onto the other spot node
        # A fast machine may be done before a replica tells of it, so more comes until it has grown.
        nodes.answered(nodes.call(2), 2)

    busy = nodes.call(4)
    lost = nodes.there["L4"]  # of every stage something is there
    lost.cut_off()
    nodes.answered(busy, 4)
    lost.kill()
    assert not nodes.placed()["L4"]
    nodes.answered(nodes.call(1), 1)

    lost.join_again()
    nodes.ray("L4", more=("--num-cpus=1",))
    nodes.until(lambda: nodes.placed() == _PLACED, "the node is back, and its pools on it")
    nodes.answered(nodes.call(2), 2)


@pytest.mark.slow
def test_a_node_goes_by_its_deadline_and_the_last_one_of_a_stage_by_force(nodes: Nodes):
    if nodes.there["L4"].address == nodes.there["A10G"].address:
        pytest.skip("nodes that share an address are not told apart")
    bring_up(nodes)
    l4 = nodes.there["L4"]
    # No other node has its card, so replicas stay; a new node of the machine takes them over.
    assert nodes.drain("L4", "--wait", "3")[0] == 1
    nodes.ray("L4", more=("--num-cpus=1",))
    nodes.until(lambda: sum("/raylet/raylet" in each for each in l4.commands()) == 1, "it has gone")
    nodes.until(lambda: {"text", "decode"} <= nodes.placed()["L4"], "the new one has its pools")

    code, told = nodes.drain("A10G", "--deadline", "5", "--wait", "200")
    assert (code, told["left"]) == (0, 0), told
    nodes.until(lambda: not nodes.placed()["A10G"], "nothing is left on A10G")
    nodes.answered(nodes.call(1), 1)

    code, told = nodes.drain("L4")
    assert (code, told["error"]["field"]) == (2, "node"), told
    assert "stage text has no replica" in told["error"]["message"]
    code, told = nodes.drain("L4", "--force", "--wait", "3")
    assert (code, told["drains"]) == (1, True), told
    nodes.answered(nodes.call(1), 1)  # it serves as long as there is no room elsewhere
    code, told = nodes.drain("L4", "--force", "--deadline", "5", "--wait", "200")
    assert (code, told["left"]) == (0, 0), told
