"""LoRAs on a card: kernels beside the plain way, graphs beside eager, rows beside one another."""

import pytest
import torch

from deployments.sd3.fp8 import QuantizedRows, quantize_rows
from deployments.sd3.joint_layout import to_joint
from deployments.sd3.lora_arena import LoraArena, LowRank
from deployments.sd3.lora_layers import Adaptable, RowLoras
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.stream_layout import PerStream, StreamLayout
from loadtest.random_lora import random_lora
from loadtest.sd35 import config, random_inputs, random_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LARGE = 2432
KINDS = {
    "qkv": Adaptable((("q", "k", "v"), ("aq", "ak", "av")), LARGE, (LARGE,) * 3),
    "down": Adaptable((("ff",), ("ff_context",)), 4 * LARGE, (LARGE,)),
    "narrow": Adaptable((("q", "k", "v"),), 320, (320,) * 3),
    "modulation": Adaptable((("n0", "n1", "n2"),), 1536, (9 * 1536, 6 * 1536, 2 * 1536)),
}


def low_rank(of: Adaptable, rank: int) -> dict[str, LowRank]:
    return {
        name: LowRank(
            torch.randn(rank, of.inputs) * of.inputs**-0.5, torch.randn(columns, rank) * 0.3
        )
        for names in of.names
        for name, columns in zip(names, of.columns, strict=True)
    }


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("layout", [StreamLayout(3, 100, 33), StreamLayout(2, 64, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_the_plain_way(kind, layout, quantised):
    of = KINDS[kind]
    if kind == "modulation":
        layout = StreamLayout(layout.batch, 1, 0)
    elif len(of.names) == 1:
        layout = layout.image_only
    torch.manual_seed(0)
    arena = LoraArena([of], 9, torch.device("cuda"), torch.bfloat16)
    for page, content in zip((8, 2), arena.pack(low_rank(of, 20)), strict=True):
        arena.write(page, content)
    partial = low_rank(of, 3)
    del partial[of.names[0][0]]
    arena.write(5, arena.pack(partial)[0])
    uses = [[(8, 0.5), (2, 0.5), (5, 2.0)], [], [(5, -1.0)]][: layout.batch]
    loras = RowLoras.of(uses, arena.most_a_row, torch.device("cuda"))
    x: torch.Tensor | QuantizedRows = torch.randn(layout.rows, of.inputs, device="cuda").bfloat16()
    if quantised:
        assert isinstance(x, torch.Tensor)
        x = quantize_rows(x)
    before = torch.randn(layout.rows, sum(of.columns), device="cuda").bfloat16()
    ours, plain = before.clone(), before.float()
    (branch,) = arena.branches
    branch.add_(ours, x, layout, loras)
    branch.down, branch.up = (
        tuple(each.float() for each in matrices) for matrices in (branch.down, branch.up)
    )
    exact = x if isinstance(x, QuantizedRows) else x.float()
    branch._add_plainly(plain, exact, layout, loras)
    own = slice(layout.image, 2 * layout.image)  # the image of the row that nothing adapts
    assert torch.equal(ours[own], before[own])
    wanted = plain - before.float()
    assert wanted.norm() > 0.1 * before.norm()
    assert (ours.float() - plain).norm() < 6e-3 * plain.norm()


def thirds(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = whole.chunk(3, dim=1)
    return query, key, value


@pytest.mark.parametrize("layout", [StreamLayout(3, 100, 33), StreamLayout(2, 64, 0)], ids=str)
def test_what_brings_query_key_and_value_to_attention_adds_their_branch(layout):
    heads, width = 5, 320
    both = (("q", "k", "v"), ("aq", "ak", "av"))
    of = Adaptable(both if layout.text else both[:1], width, (width,) * 3)
    torch.manual_seed(0)
    arena = LoraArena([of], 3, torch.device("cuda"), torch.bfloat16)
    for page, content in zip((2, 0), arena.pack(low_rank(of, 20)), strict=True):
        arena.write(page, content)
    image_only = {name: low_rank(of, 3)[name] for name in of.names[0]}
    arena.write(1, arena.pack(image_only)[0])
    uses = [[(2, 0.5), (0, 0.5), (1, 2.0)], [(1, -1.0)], []][: layout.batch]
    loras = RowLoras.of(uses, arena.most_a_row, torch.device("cuda"))
    x = quantize_rows(torch.randn(layout.rows, width, device="cuda").bfloat16())
    projected = torch.randn(layout.rows, 3 * width, device="cuda").bfloat16()
    norms = [
        PerStream(*(torch.rand(64, device="cuda").bfloat16() + 0.5 for _ in range(2)))
        for _ in range(2)
    ]
    (branch,) = arena.branches
    pending = branch.pending(x, layout, loras)
    ours = to_joint(thirds(projected), layout, heads, *norms, fused=True, adapted=pending)
    plain = projected.clone()
    branch._add_plainly(plain, x, layout, loras)
    expected = to_joint(thirds(plain), layout, heads, *norms, fused=False)
    without = to_joint(thirds(projected), layout, heads, *norms, fused=False)
    for one, other, unadapted in zip(ours, expected, without, strict=True):
        assert relative(one.float(), other.float()) < 8e-3
        assert relative(unadapted.float(), other.float()) > 0.05


@pytest.fixture(scope="module")
def mmdit() -> Mmdit:
    made = Mmdit.from_diffusers(
        random_transformer("tiny-dual", "cuda", torch.bfloat16), "cuda", "fp8"
    )
    made.make_room_for_loras(4)
    for rows in (1, 4):
        made.prepare(16, 16, 13, rows)
    return made


def rows_of(mmdit: Mmdit, uses, rows: slice = slice(0, 4)) -> torch.Tensor:
    inputs = random_inputs(config("tiny-dual"), 4, 16, 16, "cuda", text_tokens=13)
    return mmdit.velocity(
        inputs.latents[rows],
        inputs.sigmas[rows],
        inputs.prompt_embeds[rows],
        inputs.pooled[rows],
        uses[rows],
    )


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def test_a_graph_with_loras_gives_what_kernels_one_by_one_give(mmdit):
    assert mmdit.loras is not None
    eager = Mmdit.from_diffusers(
        random_transformer("tiny-dual", "cuda", torch.bfloat16),
        "cuda",
        "fp8",
        Optimizations(cuda_graphs=False),
    )
    arena = eager.make_room_for_loras(4)
    first = random_lora(mmdit, 20, "all", 0)
    for page, content in zip((3, 0), mmdit.loras.pack(first), strict=True):
        mmdit.loras.write(page, content)
        arena.write(page, content)
    second = mmdit.loras.pack(random_lora(mmdit, 7, "attention", 1))[0]
    mmdit.loras.write(1, second)
    arena.write(1, second)
    uses = [[(3, 1.0), (0, 1.0)], [(1, 0.5)], [], [(1, 1.0), (3, -0.5), (0, -0.5)]]
    assert mmdit.path(16, 16, 13, 4, adapted=True) == "graph"
    ours, plain = rows_of(mmdit, uses), rows_of(mmdit, [()] * 4)
    assert relative(ours, rows_of(eager, uses)) < 1e-3
    for row in (0, 1, 3):
        assert relative(ours[row], plain[row]) > 0.01
    # Each as alone: no further than FP8's own error, here some per cent.
    for row in range(4):
        alone = rows_of(mmdit, uses, slice(row, row + 1))
        assert relative(alone[0], ours[row]) < 0.02


def test_rows_without_are_bit_for_bit_what_they_were_and_nan_stays_where_it_is(mmdit):
    assert mmdit.loras is not None
    broken = {
        name: LowRank(layer.down * float("inf"), layer.up)
        for name, layer in random_lora(mmdit, 4, "all", 2).items()
    }
    mmdit.loras.write(2, mmdit.loras.pack(broken)[0])
    plain = rows_of(mmdit, [()] * 4)
    mixed = rows_of(mmdit, [[(2, 1.0)], (), (), ()])
    assert not torch.isfinite(mixed[0]).any()
    assert torch.equal(mixed[1:], plain[1:])
