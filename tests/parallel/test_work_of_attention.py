"""Full attention executes the tiles that plans are priced by, call by call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parallel.planning.building import build
from parallel.planning.cost import price
from parallel.planning.costs import Costs
from parallel.planning.layout import Plan, Topology
from parallel.planning.owners import on_all_ranks
from parallel.planning.plan import Strategy, plan
from parallel.travel.rings import Call, share

LENGTHS = [[900, 700, 333, 40, 1], [5000, 1200, 64, 0, 300], [31, 30, 29] * 4]


def tiles(call: Call, tile: int) -> int:
    """Tiles of a call in which any query sees a key, counted one by one for each sequence."""
    found = 0
    for q, k in zip(
        call.cu_seqlens.diff().tolist(), call.cu_seqlens_k.diff().tolist(), strict=True
    ):
        for row in range(-(-q // tile)):
            last = min((row + 1) * tile, q) if call.causal else k
            found += -(-last // tile)
    return found


def executed(made: Plan, tile: int) -> np.ndarray:
    """Pairs in the tiles that each rank computes forward, with all heads: float64 (ranks,)."""
    found = np.zeros(made.topology.ranks)
    for rank in range(made.topology.ranks):
        for ring, member in made.rings_of(rank):
            for step in share(ring, member, torch.device("cpu")):
                found[rank] += sum(tiles(call, tile) for call in step.calls)
        rows = made.whole(rank)
        for length in (made.attention.end - made.attention.start)[rows].tolist():
            found[rank] += sum(
                -(-min(end, length) // tile) for end in range(tile, length + tile, tile)
            )
    return found * tile**2


@pytest.mark.parametrize("tile", [1, 16, 128])
@pytest.mark.parametrize("strategy", ["balanced", "ring", "even"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ranks_compute_the_tiles_of_their_price(
    lengths: list[int], strategy: Strategy, tile: int
) -> None:
    """To the unit where a ring has several sequences. Of a single one the two chunks of a seat are
    one call, which may fill one tile better than two would: then the price is too high by at most
    one tile for each row of tiles and each of the twelve chunks of six seats."""
    costs = Costs(pair=1.0, tile=tile)
    made = plan(lengths, Topology(6, 3), strategy, costs)
    priced, done = price(made, costs).arithmetic[0], executed(made, tile)
    alone = {rank for ring in made.rings if len(ring.sequences) == 1 for rank in ring.members}
    for rank in range(6):
        if rank in alone and tile > 1:
            spare = tile * sum(int(ring.tokens.max()) + 2 * tile for ring in made.rings)
            assert done[rank] <= priced[rank] <= done[rank] + 12 * spare
        else:
            assert priced[rank] == done[rank]


def test_slices_share_the_tiles_of_their_seat() -> None:
    """Four slices on two seats: each rank has a quarter of the heads."""
    costs = Costs(pair=1.0, tile=16, heads=8, kv_heads=8)
    owners = on_all_ranks(2, Topology(8, 8))
    owners.grids = [np.arange(8).reshape(1, 2, 4)]
    made = build("rings", np.array([700, 400]), owners, Topology(8, 8), True)
    assert price(made, costs).arithmetic[0] == pytest.approx(executed(made, 16) / 4)
