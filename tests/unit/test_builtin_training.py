"""The parts of training that can be wrong without anyone seeing it in a loss curve."""

import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from deployments.builtin import checkpoint
from deployments.builtin.architecture import Parts, build_scheduler
from deployments.builtin.checkpoint import (
    joined,
    load_average,
    load_resume,
    pieces,
    save_average,
    save_resume,
    shards,
)
from deployments.builtin.example_stream import ChunkMaker, ExampleStream, StreamSettings, chunk_size
from deployments.builtin.flow_training import FlowTraining, learning_rate_factor
from deployments.builtin.frame_pool import FramePool, PoolFiller
from deployments.builtin.loss_watch import LossWatch
from deployments.builtin.optimizer import BatchedMuon, Optimizer, WeightAverage, orthogonalise
from deployments.builtin.pico import build_pico
from deployments.builtin.training_log import Budget, TrainingLog
from deployments.builtin.velocity_step import StepInput, StepRunner

SIZES = (((128, 128), 0.75), ((112, 144), 0.25))
SETTINGS = StreamSettings(
    seed=1,
    name="test",
    chunk=8,
    sizes=SIZES,
    kinds=(("core", 0.6), ("hard", 0.4)),
    clip_length=32,
    t5_length=48,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_orthogonalise_brings_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 8), (2, 8, 24), (1, 16, 16)):
        values = torch.linalg.svdvals(
            orthogonalise(torch.randn(shape, generator=generator) * 1e-4).float()
        )
        assert values.max() < 1.35
        assert values.min() > 0.3


def test_batched_muon_updates_each_matrix_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(0)

    def weights() -> list[nn.Parameter]:
        generator.manual_seed(0)
        made = [nn.Parameter(torch.randn(12, 8, generator=generator)) for _ in range(3)]
        for parameter in made:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return made

    together, alone = weights(), weights()
    optimizers = [BatchedMuon([parameter]) for parameter in alone]
    batched = BatchedMuon(together)
    for _ in range(3):
        batched.step(0.01)
        for optimizer in optimizers:
            optimizer.step(0.01)
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-2)


def test_chunks_depend_on_the_seed_and_their_place_only():
    first, second = ChunkMaker(SETTINGS), ChunkMaker(SETTINGS)
    second.make(0)
    one, other = first.make(5), second.make(5)
    assert one.scenes == other.scenes
    assert np.array_equal(one.t5_ids, other.t5_ids)
    assert one.scenes != first.make(6).scenes


def test_every_size_comes_first_then_by_weight():
    sizes = [chunk_size(SETTINGS, index) for index in range(400)]
    assert sizes[:2] == [(128, 128), (112, 144)]
    assert 0.65 < sizes.count((128, 128)) / len(sizes) < 0.85


def test_workers_give_the_same_chunks_as_no_workers():
    here, there = ExampleStream(SETTINGS, workers=0), ExampleStream(SETTINGS, workers=2)
    try:
        for _ in range(4):
            mine, theirs = here.take(), there.take()
            assert (mine.index, mine.scenes) == (theirs.index, theirs.scenes)
    finally:
        there.close()


def test_a_failing_worker_is_reported():
    broken = StreamSettings(
        seed=1,
        name="x",
        chunk=2,
        sizes=(((16, 16), 1.0),),
        kinds=(("hard", 1.0),),
        clip_length=32,
        t5_length=48,
    )
    stream = ExampleStream(broken, workers=1)
    try:
        with pytest.raises(RuntimeError, match="no hard scene fits"):
            stream.take()
    finally:
        stream.close()


def test_a_pool_keeps_the_newest_rows_with_their_prompts():
    pool = FramePool(16, (3, 128, 128), torch.uint8, 32, 48, torch.device("cpu"))
    filler = PoolFiller({(128, 128): pool}, torch.device("cpu"), lambda frames: frames)
    maker = ChunkMaker(SETTINGS)
    square = [i for i in range(40) if chunk_size(SETTINGS, i) == (128, 128)][:3]
    chunks = [maker.make(index) for index in square]
    for chunk in chunks:
        filler.put(chunk)
    assert pool.filled == 16
    assert np.array_equal(pool.t5_ids[:8].numpy(), chunks[2].t5_ids)  # the oldest was replaced
    assert np.array_equal(pool.t5_ids[8:].numpy(), chunks[1].t5_ids)


def test_the_learning_rate_rises_holds_and_falls_to_zero():
    training = FlowTraining(steps=1000, seconds=0, warmup_steps=100, hold=0.4)
    assert learning_rate_factor(0, 0.0, training) == pytest.approx(0.01)
    assert learning_rate_factor(300, 0.3, training) == 1.0
    assert learning_rate_factor(700, 0.7, training) == pytest.approx(0.5)
    assert learning_rate_factor(1000, 1.0, training) == pytest.approx(0.0, abs=1e-9)


def test_training_times_lie_where_the_sampler_takes_its_steps():
    training = FlowTraining()
    normal = NormalDist(training.time_mean, training.time_std)
    scheduler = build_scheduler()
    scheduler.set_timesteps(20)
    sigmas = [float(sigma) for sigma in scheduler.sigmas[:-1]]
    for bound in (0.5, 0.8, 0.9):
        trained = 1 - normal.cdf(math.log(bound / (1 - bound)))
        sampled = sum(sigma > bound for sigma in sigmas) / len(sigmas)
        assert trained > sampled / 2


def _step(seed: int) -> StepInput:
    generator = torch.Generator().manual_seed(seed)
    return StepInput(
        latents=torch.randn(4, 16, 8, 8, generator=generator),
        noise=torch.randn(4, 16, 8, 8, generator=generator),
        sigmas=torch.rand(4, generator=generator),
        clip_ids=torch.randint(0, 90, (4, 32), generator=generator),
        t5_ids=torch.randint(0, 90, (4, 48), generator=generator),
    )


@pytest.mark.parametrize("limit", [24, 25, 40, 10**6])
def test_a_tensor_larger_than_a_shard_is_cut_and_joined_again(limit: int):
    tensors = {
        "opt.muon.0": torch.arange(66.0).reshape(11, 3, 2),
        "opt.adam.0.step": torch.tensor(5.0),
        "opt.adam.1.exp_avg": torch.arange(4.0),
    }
    groups = shards(pieces(tensors, limit), limit)
    assert all(sum(t.nbytes for t in group.values()) <= limit for group in groups)
    stored = {name: tensor for group in reversed(groups) for name, tensor in group.items()}
    back = joined(stored)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("limit", [None, 40_000])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
):
    if limit:  # smaller than the optimizer's stacks, as a shard is with nine blocks
        monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", limit)

    def fresh() -> tuple[Parts, Optimizer, WeightAverage, StepRunner]:
        parts, _, _ = build_pico(seed=2)
        optimizer = Optimizer(parts, 1e-3, 1e-3, 0.01)
        average = WeightAverage(optimizer.parameters, 0.9)
        runner = StepRunner(parts, optimizer.flat_gradient, use_graphs=False)
        return parts, optimizer, average, runner

    def run(
        state: tuple[Parts, Optimizer, WeightAverage, StepRunner], steps: Iterable[int]
    ) -> None:
        _, optimizer, average, runner = state
        for step in steps:
            runner(_step(step))
            optimizer.step(1.0)
            average.update(step)

    whole = fresh()
    run(whole, range(4))
    halved = fresh()
    run(halved, range(2))
    path = tmp_path / "resume"
    save_resume(path, halved[0], halved[2], halved[1], {"step": 2})
    largest = max(file.stat().st_size for file in path.iterdir())
    assert largest <= (limit or checkpoint.MAX_SHARD_BYTES) + 40_000  # with its header
    resumed = fresh()
    assert load_resume(path, resumed[0], resumed[2], resumed[1]) == {"step": 2}
    run(resumed, range(2, 4))
    for mine, expected in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, expected)
    for mean, expected_mean in zip(resumed[2].average, whole[2].average, strict=True):
        assert torch.equal(mean, expected_mean)


def test_steps_lower_the_loss_of_what_they_see():
    parts, _, _ = build_pico(seed=0)
    optimizer = Optimizer(parts, 3e-3, 3e-3, 0.0)
    runner = StepRunner(parts, optimizer.flat_gradient, use_graphs=False)
    first = float(runner(_step(0)))
    for _ in range(30):
        runner(_step(0))
        optimizer.step(1.0)
    assert float(runner(_step(0))) < 0.7 * first


def test_averaged_weights_survive_their_shards(tmp_path: Path):
    parts, _, _ = build_pico()
    average = WeightAverage(list(parts.parameters()), 0.9)
    save_average(tmp_path, parts, average)
    loaded = load_average(tmp_path)
    for name, parameter in parts.named_parameters():
        torch.testing.assert_close(loaded[name], parameter.detach(), atol=1e-3, rtol=1e-3)
    with pytest.raises(FileNotFoundError, match="no ema"):
        load_average(tmp_path / "nowhere")


def test_crops_and_captions_use_no_global_randomness():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    ChunkMaker(SETTINGS).make(0)
    assert random.random() == expected


def test_a_broken_loss_brings_back_the_last_good_weights(tmp_path: Path):
    weight = torch.ones(3)
    log = TrainingLog(tmp_path / "log.jsonl")
    watch = LossWatch(lambda: [weight], log, Budget(10, 0.0), batch=1)
    watch.add(torch.tensor(0.5), torch.tensor(1.0))
    watch.report(1, 1.0, 0.1)
    weight.fill_(float("nan"))
    watch.add(torch.tensor(float("nan")), torch.tensor(1.0))
    watch.report(2, 1.0, 0.2)
    assert torch.equal(weight, torch.ones(3))
    assert watch.damping < 1
    assert watch.restores == 1
