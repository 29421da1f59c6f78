"""Rows of tokens that travel to the homes of their experts, against every expert in one process.

The definition is written out: y_t = Σ_e w_te · out_e (silu(gate_e x_t) ⊙ up_e x_t). fp64, to 1e-12.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from parallel import World
from parallel.planning.layout import Topology
from parallel.travel.exchange import sent_bytes
from parallel.travel.homes import Homes
from parallel.travel.rows import Rows

D, INNER = 6, 5


def chosen_experts(how: str, tokens: list[int], experts: int, k: int) -> Tensor:
    """(Σ tokens, k): different experts for each token."""
    t = sum(tokens)
    score = torch.rand(t, experts, generator=torch.Generator().manual_seed(2))
    number = torch.arange(experts)
    if how == "one expert":  # all tokens meet the last one
        score[:, -1] = 2
    elif how == "one rank":
        score[:, :k] = 2
    elif how == "none to a rank":  # nor to any of the first experts
        score[:, : max(experts // 3, 1)] = -1
    elif how == "ties":
        score = number.flip(0).expand(t, -1)
    else:
        assert how == "even"
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


def given(tokens: list[int], experts: int, k: int, how: str, dtype: torch.dtype) -> list[Tensor]:
    """x, experts, weights, up, out and a gradient of y, of all ranks."""
    draw = torch.Generator().manual_seed(1)
    t = sum(tokens)
    x, dy = (torch.randn(t, D, generator=draw, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(t, k, generator=draw, dtype=torch.float64)
    up = torch.randn(experts, 2 * INNER, D, generator=draw, dtype=torch.float64)
    out = torch.randn(experts, D, INNER, generator=draw, dtype=torch.float64)
    x, weights, up, out, dy = (one.to(dtype) for one in (x, weights, up, out, dy))
    return [x, chosen_experts(how, tokens, experts, k), weights, up, out, dy]


def definition(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, out: Tensor) -> Tensor:
    y = []
    for row, mine, factors in zip(x, experts.tolist(), weights, strict=True):
        parts = []
        for expert, factor in zip(mine, factors, strict=True):
            gate, above = (up[expert] @ row).chunk(2)
            parts.append(factor * (out[expert] @ (F.silu(gate) * above)))
        y.append(torch.stack(parts).sum(0))
    return torch.stack(y)


Case = tuple[list[int], int, int, str]


def worst(
    world: World, case: Case, spread: float, dtype: torch.dtype, each: int, fetch: bool = False
) -> tuple[float, int, int]:
    """The largest error of this rank's rows and gradients, in units of their scale, waves, and most
    rows at a time."""
    world = dataclasses.replace(world, ranks_per_node=each)
    tokens, experts, k, how = case
    every = given(tokens, experts, k, how, dtype)
    begin, size = sum(tokens[: world.rank]), tokens[world.rank]
    x, choice, weights, up, out, dy = every
    homes = Homes(experts, world.topology)
    first, end = homes.run(world.rank)
    x, weights = (one[begin : begin + size].clone().requires_grad_() for one in (x, weights))
    up, out = (one[first:end].clone().requires_grad_() for one in (up, out))
    most = 0

    def local(x: Tensor, rows: Tensor, *more: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(rows))
        return kernels.expert_mlp(x, rows, *more)

    rows = Rows(homes, world.rank, world.group, world.device, either=fetch)
    rows.spread = spread
    if fetch:  # whatever it is in bytes
        rows._bytes = lambda _: -1  # type: ignore[method-assign]
    y = rows.begin(x, choice[begin : begin + size], weights, (up, out))(local)
    y.backward(dy[begin : begin + size])

    leaves = [one.clone().requires_grad_() for one in (every[0], *every[2:5])]
    wanted = definition(leaves[0], choice, *leaves[1:])
    grads = torch.autograd.grad(wanted, leaves, dy)
    mine = slice(begin, begin + size)
    pairs = [(y, wanted[mine]), (x.grad, grads[0][mine]), (weights.grad, grads[1][mine])]
    for part, whole in zip((up, out), grads[2:], strict=True):
        full = torch.zeros_like(whole)
        full[first:end] = part.grad
        pairs.append((world.sum(full), whole))  # replicas have parts of an expert's gradient
    error = max(
        float((got - want).detach().abs().max() / max(1, want.abs().max())) if want.numel() else 0.0
        for got, want in pairs
    )
    return error, rows.waves, most


CASES: dict[int, list[Case]] = {
    1: [([7], 4, 2, "even")],
    2: [([9, 4], 5, 3, "even"), ([0, 6], 4, 2, "one rank"), ([5, 5], 1, 1, "even")],
    3: [
        ([11, 7, 9], 64, 8, "even"),
        ([4, 0, 9], 64, 8, "one rank"),
        ([8, 8, 8], 64, 1, "one expert"),
        ([8, 8, 8], 6, 2, "none to a rank"),
        ([6, 6, 6], 6, 3, "ties"),
        ([5, 1, 3], 2, 1, "one expert"),
    ],
    4: [
        ([5, 6, 1, 8], 2, 2, "even"),
        ([5, 6, 1, 8], 2, 1, "one expert"),
        ([0, 0, 0, 8], 3, 2, "even"),
        ([12, 12, 12, 12], 16, 4, "one rank"),
    ],
}


@pytest.mark.parametrize(
    ("size", "each"), [(1, 1), (2, 2), (2, 1), (3, 3), (3, 2), (4, 4), (4, 2), (4, 3)]
)
def test_rows_travel_exactly(ranks, size: int, each: int) -> None:
    """On nodes of `each` ranks, and a last one of what is left."""
    for case in CASES[size]:
        for error, *_ in ranks(size).run(worst, case, Rows.spread, torch.float64, each):
            assert error < 1e-12, case


@pytest.mark.parametrize(("size", "each"), [(2, 2), (3, 2), (4, 2)])
def test_matrices_travel_exactly_instead(ranks, size: int, each: int) -> None:
    for case in CASES[size]:
        for error, waves, most in ranks(size).run(
            worst, case, Rows.spread, torch.float64, each, True
        ):
            assert error < 1e-12, case
            assert waves == 0
            assert most <= max(case[0]) * case[2]


@pytest.mark.parametrize("how", ["even", "one rank", "one expert"])
def test_rows_beyond_the_bound_take_turns(ranks, how: str) -> None:
    """In fp32 too, to 1e-5. No home has more rows at a time than `spread` times the mean."""
    case = [40, 41, 30], 9, 2, how
    mean = 111 * 2 / 3
    for spread, dtype, tolerance in [
        (0.5, torch.float64, 1e-12),
        (2.0, torch.float64, 1e-12),
        (0.2, torch.float32, 1e-5),
    ]:
        results = ranks(3).run(worst, case, spread, dtype, 2)
        for error, waves, most in results:
            assert error < tolerance
            assert most <= spread * mean
            assert (waves > 1) == (spread < 1 or how == "one rank")
        assert len({waves for _, waves, _ in results}) == 1


def added(world: World, each: int) -> Tensor:
    """What comes back in bf16 of 256 from the first rank and 1 from each other."""
    world = dataclasses.replace(world, ranks_per_node=each)
    rows = Rows(Homes(4, world.topology), world.rank, world.group, world.device)
    x = torch.zeros(3, D, dtype=torch.bfloat16)
    experts = torch.arange(4).expand(3, 4)
    value = 256.0 if world.rank == 0 else 1.0
    finish = rows.begin(x, experts, torch.ones(3, 4), ())
    return finish(lambda x, *_: torch.full_like(x, value))


@pytest.mark.parametrize(("each", "wanted"), [(4, 260.0), (2, 258.0)])
def test_sums_over_homes_are_fp32(ranks, each: int, wanted: float) -> None:
    """259 becomes 260 in bf16. On two nodes 257 becomes 256, and 256 + 2 is left. Sums in bf16
    would be 256 on one node."""
    for got in ranks(4).run(added, each):
        assert (got.float() == wanted).all()


def counted(
    world: World, case: Case, each: int, either: bool = False
) -> tuple[dict[int, int], int]:
    """Bytes that this rank sent to each other in a forward and backward pass, forward alone unless
    `either`, and how often the host waited."""
    world = dataclasses.replace(world, ranks_per_node=each)
    tokens, experts, k, how = case
    x, choice, weights, up, out, _ = given(tokens, experts, k, how, torch.float32)
    begin, size = sum(tokens[: world.rank]), tokens[world.rank]
    mine = slice(begin, begin + size)
    homes = Homes(experts, world.topology)
    first, end = homes.run(world.rank)
    rows = Rows(homes, world.rank, world.group, world.device, either)
    before = sent_bytes.copy()
    with mock.patch.object(rows, "_told", wraps=rows._told) as told:
        matrices = up[first:end].requires_grad_(either), out[first:end].requires_grad_(either)
        x, weights = (one[mine].requires_grad_(either) for one in (x, weights))
        y = rows.begin(x, choice[mine], weights, matrices)(kernels.expert_mlp)
        if either:
            y.sum().backward()
    return dict(sent_bytes - before), told.call_count


@pytest.mark.parametrize("each", [4, 2])
def test_a_row_goes_once_to_a_rank_and_once_to_a_node(ranks, each: int) -> None:
    """Bytes between ranks, or between nodes of two ranks: a row there for each pair of a token and
    another rank (node) with an expert of it, one back, and 6 bytes for each expert of the token.
    On nodes the same for ranks of the node, of rows from elsewhere too. Never more rows than an
    all-to-all of all rows has, which sends each one for itself."""
    tokens, experts, k, how = case = [20, 30, 10, 25], 8, 3, "even"
    home = torch.arange(experts) // 2
    target = home[chosen_experts(how, tokens, experts, k)]  # (t, k)
    owner = torch.arange(4).repeat_interleave(torch.tensor(tokens))
    row = 2 * 4 * D + 6 * k

    def pairs(target: Tensor, owner: Tensor, size: int) -> int:
        return sum(int(((target == one).any(1) & (owner != one)).sum()) for one in range(size))

    results = ranks(4).run(counted, case, each)
    assert [told for _, told in results] == [1, 1, 1, 1]
    between = sum(
        count
        for rank, (sent, _) in enumerate(results)
        for peer, count in sent.items()
        if rank // each != peer // each or each == 4
    )
    everywhere = sum(count for sent, _ in results for count in sent.values())
    if each == 4:
        assert everywhere == between == pairs(target, owner, 4) * row
        assert pairs(target, owner, 4) < int((target != owner[:, None]).sum())
    else:
        assert between == pairs(target // 2, owner // 2, 2) * row
        # The proxy has the number of the owner on its node.
        inside = sum(
            int(((target == rank).any(1) & (owner % 2 != rank % 2)).sum()) for rank in range(4)
        )
        assert everywhere - between == inside * row


@pytest.mark.parametrize("each", [4, 2])
def test_the_counts_of_a_batch_choose_what_is_fewer_bytes(ranks, each: int) -> None:
    """Tokens of one rank that want its own experts send nothing; many of all ranks send matrices,
    three times each; a few send rows, at most as many bytes as matrices would be."""
    experts, matrices = 8, 3 * 3 * 8 * 4 * (2 * INNER * D + D * INNER)
    for tokens, k, how, expected in [
        ([0, 0, 0, 9], 1, "one expert", [0]),
        ([60, 60, 60, 60], 3, "even", [matrices]),
        ([3, 1, 2, 1], 1, "even", range(1, matrices)),
    ]:
        results = ranks(4).run(counted, (tokens, experts, k, how), each, True)
        assert sum(sum(sent.values()) for sent, _ in results) in expected


@pytest.mark.parametrize("ranks_of_a_node", [1, 3, 8])
@pytest.mark.parametrize(("experts", "size"), [(64, 3), (2, 4), (5, 5), (3, 8), (1, 7), (7, 20)])
def test_every_expert_has_homes(experts: int, size: int, ranks_of_a_node: int) -> None:
    homes = Homes(experts, Topology(size, min(ranks_of_a_node, size)))
    held = [range(*homes.run(rank)) for rank in range(size)]
    assert sorted({expert for run in held for expert in run}) == list(range(experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    node = homes.topology.node
    for rank in range(size):
        assert homes.replicas(rank) == [other for other in range(size) if held[other] == held[rank]]
        seen = homes.seen_from(rank)
        assert len(seen) == experts
        for expert, home in enumerate(seen.tolist()):
            assert expert in held[home]
            near = [r for r in range(size) if expert in held[r] and node(r) == node(rank)]
            assert not near or home in near


@pytest.mark.parametrize(("size", "each"), [(4, 4), (4, 2), (3, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(("experts", "chosen"), [(6, 2), (5, 3), (2, 1)])
def test_the_visits_expected_are_the_mean_over_all_choices(
    size: int, each: int, experts: int, chosen: int
) -> None:
    homes = Homes(experts, Topology(size, each))
    node = homes.topology.node
    between, inside = [], []
    for rank in range(size):
        seen = homes.seen_from(rank)
        for choice in combinations(range(experts), chosen):
            met = {int(seen[expert]) for expert in choice}
            between.append(len({node(home) for home in met} - {node(rank)}))
            inside.append(sum(int(homes.proxy(rank, home)) != home for home in met))
    wanted = sum(between) / len(between), sum(inside) / len(inside)
    assert homes.visits(chosen) == pytest.approx(wanted, abs=1e-12)
