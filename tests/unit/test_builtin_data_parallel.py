"""Several processes must train as one process would with all their rows."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deployments.builtin.data_parallel import Pace, Ranks
from deployments.builtin.optimizer import Optimizer, WeightAverage
from deployments.builtin.pico import build_pico
from deployments.builtin.velocity_step import StepInput, StepRunner

WORLD = 2
STEPS = 3
ROWS = 4

# What each process runs: this module's own function, so that both sides train the same thing.
_PROCESS = (
    "import sys\n"
    "from tests.unit.test_builtin_data_parallel import train_a_share\n"
    "train_a_share(sys.argv[1])"
)


def rows(step: int) -> StepInput:
    """The rows of one step, of all ranks."""
    generator = torch.Generator().manual_seed(step)
    return StepInput(
        latents=torch.randn(ROWS, 16, 4, 4, generator=generator),
        noise=torch.randn(ROWS, 16, 4, 4, generator=generator),
        sigmas=torch.rand(ROWS, generator=generator),
        clip_ids=torch.randint(0, 90, (ROWS, 32), generator=generator),
        t5_ids=torch.randint(0, 90, (ROWS, 48), generator=generator),
    )


def train(ranks: Ranks) -> dict[str, torch.Tensor]:
    """A few steps on this rank's rows; all that they leave."""
    torch.set_num_threads(1)
    parts, _, _ = build_pico(seed=ranks.rank)  # each rank begins with other weights
    optimizer = Optimizer(parts, 1e-3, 1e-3, 0.01)
    average = WeightAverage(optimizer.parameters, 0.9)
    runner = StepRunner(parts, optimizer.flat_gradient, use_graphs=False)
    own = slice(ranks.rank * ranks.own_rows(ROWS), (ranks.rank + 1) * ranks.own_rows(ROWS))
    found: dict[str, torch.Tensor] = {
        "drift.before": torch.tensor(ranks.drift(optimizer.parameters))
    }
    ranks.share([*(p.data for p in optimizer.parameters), *average.average])
    for step in range(STEPS):
        loss = runner(StepInput(*(tensor[own] for tensor in rows(step).tensors())))
        ranks.average(optimizer.flat_gradient, loss)
        found[f"gradient.{step}"] = optimizer.flat_gradient.clone()
        found[f"loss.{step}"] = loss.clone()
        optimizer.step(1.0)
        average.update(step)
    pace = ranks.share_pace(Pace(0.25 + ranks.rank, look=not ranks.first))
    found["pace"] = torch.tensor([pace.progress, float(pace.look), float(pace.stop)])
    found["drift.after"] = torch.tensor(ranks.drift(optimizer.parameters))
    for index, parameter in enumerate(optimizer.parameters):
        found[f"weight.{index}"] = parameter.detach().clone()
    return found


def train_a_share(folder: str) -> None:
    """One rank of several, as its environment says; writes what it has to ``folder``."""
    from safetensors.torch import save_file

    ranks = Ranks.from_environment()
    ranks.join(torch.device("cpu"))
    try:
        save_file(train(ranks), Path(folder) / f"{ranks.rank}.safetensors")
    finally:
        ranks.leave()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two gloo processes has after training together."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = os.environ | {
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(folder)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(WORLD)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * WORLD
    return [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


def test_all_ranks_hold_the_same_bits(found):
    first, second = found
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert float(first["drift.before"]) > 0  # the check can fail
    assert float(first["drift.after"]) == 0


def test_their_gradient_is_that_of_all_rows_together(found):
    alone = train(Ranks())
    for step in range(STEPS):
        # Later steps start from weights that differ in rounding, which Muon makes larger.
        tolerance = 1e-5 if step == 0 else 2e-2
        mine, expected = found[0][f"gradient.{step}"], alone[f"gradient.{step}"]
        assert float((mine - expected).norm() / expected.norm()) < tolerance
        torch.testing.assert_close(
            found[0][f"loss.{step}"], alone[f"loss.{step}"], rtol=1e-3, atol=0
        )


def test_the_clock_of_rank_0_decides(found):
    for each in found:
        assert each["pace"].tolist() == [0.25, 0.0, 0.0]


def test_one_process_needs_nobody():
    ranks = Ranks.from_environment({})
    assert (ranks.rank, ranks.world_size, ranks.first) == (0, 1, True)
    ranks.join(torch.device("cpu"))
    value = torch.ones(2)
    ranks.average(value)
    assert value.tolist() == [1.0, 1.0]
    assert ranks.share_pace(Pace(0.5, look=True)) == Pace(0.5, look=True)
    ranks.leave()


def test_torchruns_variables_are_read_and_checked():
    ranks = Ranks.from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)
    assert not ranks.first
    assert ranks.own_rows(1024) == 256
    with pytest.raises(ValueError, match="do not split"):
        ranks.own_rows(1023)
    with pytest.raises(ValueError, match="rank 4"):
        Ranks(4, 4)
