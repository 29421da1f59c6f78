"""Rows of tokens to the homes of their experts, and what the experts make of them back.

A token's row x_t goes once to each rank that is the home of an expert it has chosen, with the
numbers of those experts and their weights; that rank sends back one row, the weighted sum over its
own experts; the token's rank adds up what came. Gradients take the same ways from the other end.

What travels depends on the tokens, so ranks first tell each other how much it is. That is the one
time that the host waits for the device: `Rows._told`, once a layer and pass.

A home works on a bounded number of rows, a row being a token at an expert: `SPREAD` times the mean
of all homes. Where routing is so uneven that one would get more, all ranks send in `waves`, an even
part of every message in each, and nothing but the inputs is kept for the backward pass, which sends
and computes each wave again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.packing import accumulation_dtype
from parallel.peers import waiting_for
from parallel.travel.exchange import PeerRows, Table, begin_move, post, to_device
from parallel.travel.homes import Homes

SPREAD = 2.0

# x (n, D), rows (R,) int64, weights (R,), ends (experts here,) int32 -> y (n, D), as
# `kernels.expert_mlp`, with this rank's matrices.
Local = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Rows:
    """The exchange between the homes of a layer's experts.

    Args:
        group: all ranks, for the messages of layers.
        spread: most rows of a home at a time, in units of the mean over all homes.
    """

    def __init__(
        self,
        homes: Homes,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        spread: float = SPREAD,
    ) -> None:
        self.homes, self.rank, self.group, self.spread = homes, rank, group, spread
        self.ranks = homes.topology.ranks
        self.first, end = homes.run(rank)
        self.here = end - self.first  # experts of this rank
        self._home = to_device(homes.seen_from(rank), device)  # (experts,) int64
        self.waves = 1  # of the last call

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, local: Local) -> Tensor:
        """The weighted sum of each token's experts, wherever they live. All ranks call it.

        Args:
            x: (t, D), this rank's tokens, which may be none.
            experts: (t, k) int64, different ones for each token. weights: (t, k) fp32 or fp64.

        Returns:
            y, (t, D) in the dtype of x; sums over homes are fp32 (fp64 for fp64).
        """
        target = self._home[experts]  # (t, k)
        tokens, counts = _by_target(target, self.ranks)
        each = torch.zeros_like(counts)  # (ranks,): rows for each home
        each.scatter_add_(0, target.flatten(), torch.ones_like(target).flatten())
        pairs, rows = self._told(torch.stack([counts, each]))
        self.waves = waves = self._waves(pairs, rows, experts.shape[1])
        if waves == 1:
            bound = int(rows[:, self.rank].sum())
            y = self._wave(x, experts, weights, local, tokens, pairs, 0, 1, bound)
        else:
            y = x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype))
            for wave in range(waves):
                y = y + checkpoint(
                    self._wave, x, experts, weights, local, tokens, pairs, wave, waves, None,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
        return y.to(x.dtype)

    def _told(self, mine: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What every rank sends to every other: `mine` (2, ranks) -> two of (ranks, ranks).

        The host waits here for the device, and nowhere else.
        """
        every = mine.new_empty((self.ranks, *mine.shape), dtype=torch.int32)
        with waiting_for(None):
            dist.all_gather(list(every), mine.to(torch.int32), group=self.group)
        pairs, rows = every.cpu().numpy().astype(np.int64).swapaxes(0, 1)
        return pairs, rows

    def _waves(self, pairs: np.ndarray, rows: np.ndarray, chosen: int) -> int:
        """In how many waves no home gets more rows than `spread` allows.

        A wave's messages have an even share of the tokens, of which each may have all its experts
        there; with one token of each rank it is as small as it can be.

        Args:
            pairs: (ranks, ranks), tokens that each rank sends to each; rows: (ranks, ranks), rows.
        """
        most = self.spread * rows.sum() / self.ranks
        if (rows.sum(0) <= most).all():
            return 1
        experts = np.diff(self.homes.bounds)[:, 0]
        room = np.maximum(most // np.minimum(chosen, experts), self.ranks)  # (ranks,): tokens

        def fits(waves: int) -> bool:
            return bool(((-(-pairs // waves)).sum(0) <= room).all())

        return 1 + bisect_left(range(1, int(pairs.max())), True, key=fits)

    def _wave(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        local: Local,
        tokens: Tensor,
        pairs: np.ndarray,
        wave: int,
        waves: int,
        rows: int | None,
    ) -> Tensor:
        """One of `waves` even parts of the exchange: (t, D) in the dtype of sums.

        Args:
            tokens: of `_by_target`. rows: how many this rank gets, if that is known.
        """
        lows, highs = pairs * wave // waves, pairs * (wave + 1) // waves
        begins = np.cumsum(pairs[self.rank]) - pairs[self.rank]
        gives = _gives(tokens, begins, lows[self.rank], highs[self.rank])
        takes = _takes(lows[:, self.rank], highs[:, self.rank], x.device)
        there = Table(gives, takes, len(takes.rows))
        wanted, arrived = self._begin_numbers(experts, there)
        transfer = begin_move([x, weights], [there, there], self.rank, self.group)
        arrived()
        here, factors = transfer.arrive()  # (n, D), (n, k)
        by_expert, order = wanted.flatten().sort(stable=True)  # (n · k,)
        each = torch.arange(self.here, dtype=wanted.dtype, device=x.device)
        ends = torch.searchsorted(by_expert, each, right=True, out_int32=True)
        order = order[:rows]
        y = local(here, order // experts.shape[1], factors.flatten()[order], ends)
        back = Table(takes, gives, len(x), wide=True)
        return begin_move([y], [back], self.rank, self.group).arrive()[0]

    def _begin_numbers(self, experts: Tensor, table: Table) -> tuple[Tensor, Callable[[], None]]:
        """Begin to send which of its experts each token wants: (n, k) int16, counted from this
        rank's first; those of other ranks come after its last. To be read after the wait."""
        chosen = experts.shape[1]
        leaving = experts.index_select(0, table.gives.rows).to(torch.int16)
        wanted = leaving.new_empty(table.rows, chosen)
        sends, receives = table.gives.split(leaving), table.takes.split(wanted)
        if self.rank in sends:
            receives.pop(self.rank).copy_(sends.pop(self.rank))
        # gloo sends no int16.
        wait = post(
            {peer: [part.view(torch.uint8)] for peer, part in sends.items()},
            {peer: [part.view(torch.uint8)] for peer, part in receives.items()},
            self.group,
        )

        def arrived() -> None:
            wait()
            wanted.sub_(self.first)
            wanted.masked_fill_((wanted < 0) | (wanted >= self.here), self.here)

        return wanted, arrived


def _by_target(target: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Which tokens go to each rank, a token once whatever number of its experts lives there.

    Args:
        target: (t, k) int64, the home of each of a token's experts.

    Returns:
        tokens, (t · k,) int64, rank after rank and in order; what is left over is unset. counts,
        (ranks,) int64, of each rank.
    """
    t = len(target)
    key = target * t + torch.arange(t, device=target.device).unsqueeze(1)
    key = key.flatten().sort().values
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    place = torch.where(first, first.cumsum(0) - 1, len(key))
    tokens = key.new_zeros(len(key) + 1).scatter_(0, place, key % max(t, 1))[:-1]
    counts = key.new_zeros(ranks).scatter_add_(0, key // max(t, 1), first.long())
    return tokens, counts


def _gives(tokens: Tensor, begins: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> PeerRows:
    """Of each rank's run of `tokens`, which begins at `begins`, the part from low to high."""
    counts = {int(peer): int(highs[peer] - lows[peer]) for peer in np.flatnonzero(highs > lows)}
    parts = [tokens[begins[peer] + lows[peer] : begins[peer] + highs[peer]] for peer in counts] or [
        tokens[:0]
    ]
    return PeerRows(counts, torch.cat(parts))


def _takes(lows: np.ndarray, highs: np.ndarray, device: torch.device) -> PeerRows:
    """What comes from each rank, one after the other."""
    counts = {int(peer): int(highs[peer] - lows[peer]) for peer in np.flatnonzero(highs > lows)}
    return PeerRows(counts, torch.arange(sum(counts.values()), device=device))
