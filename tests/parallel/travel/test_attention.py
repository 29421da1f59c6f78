"""Full attention over a cut stream: output and every gradient as on one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parallel
from parallel import FullAttention, ParallelConfig, Shard, World, distribute
from parallel.config import Attention
from parallel.planning.building import build
from parallel.planning.heads import fractions
from parallel.planning.layout import Plan, Topology
from parallel.planning.owners import Owners, grid
from parallel.planning.plan import Strategy, plan
from parallel.travel.exchange import Transfer, sent_bytes
from parallel.travel.rings import ring_attention, share
from tests.parallel.across import STREAMS, difference, noting, plans_in_waves
from train.model.config import ModelConfig
from train.model.linear import _Columns, _Rows
from train.model.mixers import make

STRATEGIES = typing.get_args(Attention)
DIM = 8


def attention(
    world: World,
    lengths: list[int],
    strategy: str,
    window: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    model: FullAttention | None = None,
    each: int | None = None,
    by_wave: bool = False,
) -> float:
    world = dataclasses.replace(world, ranks_per_node=each or world.ranks_per_node)
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: torch.randn(1, sum(lengths), count, DIM, dtype=torch.float64, generator=generator)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }

    def layer(x: dict[str, Tensor], shard: Shard) -> Tensor:
        if by_wave:
            return wave_by_wave(x, shard)
        return parallel.softmax_attention(x["q"], x["k"], x["v"], shard, window=window)

    def whole(x: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
        k, v = (x[name].repeat_interleave(heads // kv_heads, dim=2) for name in "kv")
        scores = torch.einsum("bihd,bjhd->bhij", x["q"], k) * DIM**-0.5
        place = torch.arange(sum(lengths))
        sequence = torch.bucketize(place, cu_seqlens[1:], right=True)
        seen = (sequence[:, None] == sequence) & (place <= place[:, None])
        if window is not None:
            seen &= place > place[:, None] - window
        scores = scores.masked_fill(~seen, float("-inf"))
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    config = ParallelConfig(attention=strategy)  # type: ignore[arg-type]
    return difference(world, lengths, rows, {}, layer, whole, config, model)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_strategy_equals_one_softmax(
    ranks, size: int, lengths: list[int], strategy: str
) -> None:
    """fp64: to 1e-10."""
    assert max(ranks(size).run(attention, lengths, strategy)) < 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("window", [1, 6, 50])
@pytest.mark.parametrize(("size", "each"), [(2, 2), (4, 2), (4, 1)])
def test_a_sliding_window_reaches_over_the_cuts(
    ranks, size: int, each: int, window: int, strategy: str
) -> None:
    """fp64: to 1e-10; also if a rank holds several fragments of one sequence."""
    for lengths in STREAMS:
        arguments = (lengths, strategy, window, 4, 2, None, each)
        assert max(ranks(size).run(attention, *arguments)) < 1e-10


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 3), (6, 2), (5, 1), (8, 4)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ulysses_splits_any_heads_over_any_ranks(
    ranks, size: int, heads: int, kv_heads: int
) -> None:
    """fp64: to 1e-10; fewer heads than ranks, and numbers that do not divide each other."""
    for lengths in ([67], [1, 40, 2, 0, 17, 5, 1, 23]):
        got = ranks(size).run(attention, lengths, "ulysses", None, heads, kv_heads)
        assert max(got) < 1e-10


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_plan_of_a_model_with_heads_equals_one_softmax(ranks, size: int, alone: bool) -> None:
    """fp64: to 1e-10; with tokens that stay on their node, and on their rank (no linear layers)."""
    model = FullAttention(heads=4, kv_heads=2, head_dim=DIM, alone=alone)
    for lengths in STREAMS:
        assert max(ranks(size).run(attention, lengths, "balanced", None, 4, 2, model)) < 1e-10


def wave_by_wave(x: dict[str, Tensor], shard: Shard) -> Tensor:
    mixing = parallel.SoftmaxAttention(shard, x["q"].shape[2], x["k"].shape[2])
    for waves in mixing.leaving:
        parts = (x[name][:, :, slice(*waves.share(x[name].shape[2]))] for name in "qkv")
        mixing.send(waves, *parts)
    return torch.cat([mixing.receive(waves) for waves in mixing.arriving], dim=2)


def in_waves(
    world: World,
    each: int,
    lengths: list[int],
    waves: int,
    slices: int,
    by_wave: bool,
    heads: tuple[int, int] = (8, 4),
) -> float:
    """`attention` of some heads in waves, on one ring over all ranks with so many slices."""
    world = dataclasses.replace(world, ranks_per_node=each)

    def planned(lengths: np.ndarray, topology: Topology, *_: object, **__: object) -> Plan:
        owners = Owners(np.full(len(lengths), -1), [grid(np.arange(world.size), topology, slices)])
        made = build("rings", lengths, owners, topology, True)
        return dataclasses.replace(made, waves=waves)

    with mock.patch("parallel.planning.planner.plan", planned):
        return attention(world, lengths, "balanced", None, *heads, by_wave=by_wave)


@pytest.mark.parametrize("waves", [1, 2, 4])
@pytest.mark.parametrize(("each", "slices"), [(4, 1), (2, 1), (4, 2), (2, 2)])
def test_waves_of_heads_equal_one_softmax(ranks, each: int, slices: int, waves: int) -> None:
    """fp64: to 1e-10."""
    for lengths in STREAMS:
        assert max(ranks(4).run(in_waves, each, lengths, waves, slices, True)) < 1e-10


@pytest.mark.parametrize("slices", [1, 2])
def test_heads_that_are_there_at_once_travel_in_waves(ranks, slices: int) -> None:
    """fp64: to 1e-10; one call of a caller who has not computed them wave by wave."""
    for lengths in STREAMS:
        assert max(ranks(4).run(in_waves, 2, lengths, 4, slices, False)) < 1e-10


@pytest.mark.parametrize(("heads", "slices"), [((6, 6), 2), ((10, 10), 4), ((12, 6), 4)], ids=str)
def test_uneven_slices_rotate_from_wave_to_wave(ranks, heads: tuple[int, int], slices: int) -> None:
    """fp64: to 1e-10; if slices share no key head, ranks have equal heads, or one more."""
    for lengths in STREAMS:
        assert max(ranks(4).run(in_waves, 2, lengths, 2, slices, True, heads)) < 1e-10
    queries, _ = fractions(*heads, slices, waves=2)
    assert heads[0] > heads[1] or np.ptp(queries * heads[0]) < 1.001


def on_nodes(
    world: World,
    ranks_per_node: int,
    lengths: list[int],
    strategy: Strategy,
    routing: bool = True,
) -> float:
    """`attention` by the plan of a strategy, on a cluster of small nodes."""
    world = dataclasses.replace(world, ranks_per_node=ranks_per_node)
    planned = functools.partial(plan, strategy=strategy, routing=routing)
    with mock.patch(
        "parallel.planning.planner.plan",
        lambda lengths, topology, *_, **__: planned(lengths, topology),
    ):
        return attention(world, lengths, "balanced")


def on_slices(
    world: World, ranks_per_node: int, grids: list[list], lengths: list[int], heads: tuple[int, int]
) -> float:
    """`attention` with sequence i on the i-th of some rings (the last one's for those beyond)."""
    world = dataclasses.replace(world, ranks_per_node=ranks_per_node)

    def planned(lengths: np.ndarray, topology: Topology, *_: object, **__: object) -> Plan:
        number = np.minimum(np.arange(len(lengths)), len(grids) - 1)
        owners = Owners(-1 - number, [np.array(grid) for grid in grids])
        return build("rings", lengths, owners, topology, True)

    with mock.patch("parallel.planning.planner.plan", planned):
        return attention(world, lengths, "balanced", None, *heads)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (5, 5), (4, 1)], ids=str)
@pytest.mark.parametrize(
    ("ranks_per_node", "grids"),
    [
        (4, [[[[0, 1, 2, 3]]]]),  # one seat: Ulysses
        (4, [[[[0, 1], [2, 3]]]]),  # two seats of two
        (2, [[[[0, 1]], [[2, 3]]]]),  # the same over two nodes
        (4, [[[[0], [1]], [[2], [3]]]]),  # two rows of one node
        (4, [[[[0, 1, 2]]], [[[3]]]]),  # three slices
        (2, [[[[0, 2]], [[3, 1]]], [[[1, 2]]], [[[3], [0]]]]),  # rings of all kinds together
    ],
    ids=str,
)
def test_rings_split_heads(
    ranks, ranks_per_node: int, grids: list[list], heads: tuple[int, int]
) -> None:
    """fp64: to 1e-10; heads that do not divide, keys that several slices need."""
    for lengths in STREAMS:
        got = ranks(4).run(on_slices, ranks_per_node, grids, lengths, heads)
        assert max(got) < 1e-10


@pytest.mark.parametrize("strategy", ["balanced", "even", "ring"])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_rings_run_over_nodes(ranks, ranks_per_node: int, strategy: Strategy) -> None:
    """fp64: to 1e-10; "even" puts several sequences on one ring, chunks of no token among them."""
    for lengths in STREAMS:
        assert max(ranks(4).run(on_nodes, ranks_per_node, lengths, strategy)) < 1e-10


@pytest.mark.parametrize("strategy", ["balanced", "even", "ring"])
def test_routing_changes_no_result(ranks, strategy: Strategy) -> None:
    """fp64: to 1e-10 without it too."""
    for lengths in STREAMS:
        assert max(ranks(4).run(on_nodes, 2, lengths, strategy, False)) < 1e-10


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any op creates."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


def largest_tensor(world: World, length: int, strategy: str, window: int | None) -> int:
    count = np.arange(length)
    config = ParallelConfig(attention=strategy)  # type: ignore[arg-type]
    _, _, shard = distribute(count, count, np.array([0, length]), world, config)
    q, k, v = (torch.randn(1, shard.tokens, 4, DIM, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        parallel.softmax_attention(q, k, v, shard, window=window).sum().backward()
    return largest.numbers


@pytest.mark.parametrize(
    ("strategy", "window"),
    [("balanced", None), ("ring", None), ("ulysses", None), ("allgather", 64)],
)
def test_no_rank_holds_a_copy_of_the_stream(ranks, strategy: str, window: int | None) -> None:
    """No tensor is larger than a shard's q, whose channels may be padded to a multiple of eight."""
    length = 8192
    share = length // 4 * 4 * (DIM + 8)
    assert max(ranks(4).run(largest_tensor, length, strategy, window)) <= share


def sent_by_a_ring(world: World, ranks_per_node: int, length: int) -> int:
    world = dataclasses.replace(world, ranks_per_node=ranks_per_node)
    count = np.arange(length)
    config = ParallelConfig(attention="ring")
    _, _, shard = distribute(count, count, np.array([0, length]), world, config)
    # Stream and ring differ in their layout; only the rounds are counted here.
    view = shard.view
    assert view is not None
    shares = [share(ring, m, view.device) for ring, m in view.plan.rings_of(world.rank)]
    q, k, v = (torch.randn(length // 4, 2, DIM, requires_grad=True) for _ in range(3))
    before = sum(sent_bytes.values())
    (o,) = ring_attention(shares, [(q, k, v)], view.group)
    o.sum().backward()
    return sum(sent_bytes.values()) - before


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_a_ring_sends_a_block_a_round_and_twice_as_much_back(ranks, ranks_per_node: int) -> None:
    block = 2 * 16 * 2 * DIM * 4  # keys and values of 16 tokens, two heads, fp32
    sent = ranks(4).run(sent_by_a_ring, ranks_per_node, 64)
    assert sent == [3 * block * (1 + 2)] * 4


def calls_of_a_layer(world: World, waves: int) -> list[str]:
    """The calls of one attention layer, forward and backward, in order."""
    told: list[str] = []

    settings = {"attention": {"heads": 4, "head_dim": DIM}}
    mixer = make("attention", ModelConfig(pattern=["attention"], dim=16, mixers=settings), 0)
    count = np.arange(48)
    with contextlib.ExitStack() as stack:
        stack.enter_context(plans_in_waves(waves))
        _, _, shard = distribute(count, count, np.array([0, 29, 48]), world, ParallelConfig())
        for owner, name, what in (
            (Transfer, "start", "departs"),
            (Transfer, "start_back", "departs"),
            (Transfer, "finish", "arrives"),
            (_Rows, "forward", "to qkv"),
            (_Rows, "backward", "to qkv"),
            (_Columns, "forward", "from o"),
            (_Columns, "backward", "from o"),
        ):
            stack.enter_context(noting(told, owner, name, what))
        x = torch.randn(1, shard.tokens, 16, requires_grad=True)
        mixer(x, shard).sum().backward()
    return told


def test_the_first_and_the_last_wave_travel_beside_projections(ranks) -> None:
    """Forward q, k, v of the first wave and o of the last one, backward their gradients."""
    to, back, go, come = "to qkv", "from o", "departs", "arrives"
    forward = [to, go, to, go, come, go, come, go, come, back, come, back]
    backward = [back, go, back, go, come, go, come, go, come, to, come, to]
    assert ranks(2).run(calls_of_a_layer, 2) == [forward + backward] * 2
