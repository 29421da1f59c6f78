"""Rows of tokens to the homes of their experts, and what the experts make of them back.

A token's row x_t goes once to each rank that is the home of an expert it has chosen, with the
numbers of those experts and their weights; that rank sends back one row, the weighted sum over its
own experts; the token's rank adds up what came. Between nodes a row goes once to each node: to its
proxy, the rank of the sender's own number there, which sends it on to the homes on that node, adds
up what they make of it, and sends back one row. Gradients take the same ways from the other end.

What travels depends on the tokens, so ranks first tell each other how much it is. That is the one
time that the host waits for the device: `Rows._told`, once a layer and pass.

A home works on a bounded number of rows, a row being a token at an expert: `spread` times the mean
of all homes. Where routing is so uneven that one would get more, all ranks send in `waves`, an even
part of every message in each, and nothing but the inputs is kept for the backward pass, which sends
and computes each wave again. Waves go straight to the homes; so does everything where a proxy would
get more tokens than that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.experts import by_expert
from kernels.packing import accumulation_dtype
from parallel.peers import waiting_for
from parallel.travel.exchange import PeerRows, Table, begin_move, post, to_device
from parallel.travel.homes import Homes

# x (n, D), rows (R,) int64, weights (R,), ends (experts,) int32, and these experts' matrices ->
# y (n, D), as `kernels.expert_mlp`.
Local = Callable[..., Tensor]
# x (n, D), experts (n, k) int64, weights (n, k) -> y (n, D): sums over the experts that are here.
_Use = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rows:
    """The exchange between the homes of a layer's experts.

    Args:
        group: all ranks, for the messages of layers.
        either: let the experts' matrices travel to the tokens instead, for a batch of which that is
            fewer bytes.

    Attributes:
        spread: most rows of a home at a time, in units of the mean over all homes.
        waves: of the last batch; 0 where matrices travelled.
    """

    spread = 2.0
    waves = 1

    def __init__(
        self,
        homes: Homes,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        either: bool = False,
    ) -> None:
        self.homes, self.rank, self.group, self.either = homes, rank, group, either
        self.ranks = homes.topology.ranks
        self.first, end = homes.run(rank)
        self.here = end - self.first  # experts of this rank
        # A rank that stands for nobody follows the last one, as an expert that no token wants does.
        self._home = to_device(np.append(homes.seen_from(rank), self.ranks), device)
        between = np.append(homes.proxy(rank, np.arange(self.ranks)), self.ranks)
        self._proxy = to_device(between, device)  # of each home, as `_home` names it
        self._by_node = 1 < homes.topology.nodes < self.ranks

    def begin(
        self, x: Tensor, experts: Tensor, weights: Tensor, matrices: Sequence[Tensor]
    ) -> Callable[[Local], Tensor]:
        """Send tokens on their way. All ranks call it, and then what it returns, which waits for
        those that come, and takes what this rank's experts make of tokens. Work in between overlaps
        the transfer, in the backward pass too.

        Args:
            x: (t, D), this rank's tokens, which may be none.
            experts: (t, k) int64, different ones for each token. weights: (t, k) fp32 or fp64.
            matrices: (experts here, …) each, what `Local` needs of experts.

        Returns:
            a function of `Local`, which returns y, (t, D) in the dtype of x: the weighted sum of
            each token's experts, wherever they live. Sums over homes are fp32 (fp64 for fp64).
        """
        target = self._home[experts]  # (t, k)
        route = _route(target, self.ranks)
        each = torch.zeros_like(route.counts)  # (ranks,): rows for each home
        each.scatter_add_(0, target.flatten(), torch.ones_like(target).flatten())
        over = _route(self._proxy[target], self.ranks) if self._by_node else route
        pairs, rows, between = self._told(torch.stack([route.counts, each, over.counts]))
        most = self.spread * rows.sum() / self.ranks
        self.waves = waves = self._waves(pairs, rows, most, experts.shape[1])
        by_node = self._by_node and waves == 1 and between.sum(0).max() <= most
        inside = self.homes.inside(pairs)
        moved = [between, inside] if by_node else [pairs]
        passes = 2 if waves == 1 else 3
        row = 2 * x.shape[1] * x.element_size() + 6 * experts.shape[1]
        if self.either and passes * row * sum(map(_moved, moved)) > self._bytes(matrices):
            self.waves = 0
            return lambda local: self._fetching(x, experts, weights, matrices, local)
        if waves > 1:
            here = self._at_home(matrices, None)
            return lambda local: self._in_turns(
                x, weights, waves, partial(self._send, experts, route, pairs), here(local)
            )
        here = self._at_home(matrices, int(rows[:, self.rank].sum()))
        if by_node:
            sent = self._send(experts, over, between, x, weights)
            return lambda local: sent(self._inside(here(local), inside)).to(x.dtype)
        sent = self._send(experts, route, pairs, x, weights)
        return lambda local: sent(here(local)).to(x.dtype)

    def _in_turns(
        self, x: Tensor, weights: Tensor, waves: int, send: Callable[..., Any], use: _Use
    ) -> Tensor:
        """All waves, one after the other."""
        y = x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype))
        for wave in range(waves):
            y = y + checkpoint(
                lambda x, weights, wave: send(x, weights, wave, waves)(use), x, weights, wave,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        return y.to(x.dtype)

    def _fetching(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        matrices: Sequence[Tensor],
        local: Local,
    ) -> Tensor:
        """Every expert's matrices come here; for the backward pass they come again."""

        def fetched(x: Tensor, weights: Tensor, *matrices: Tensor) -> Tensor:
            flat = [matrix.flatten(1) for matrix in matrices]  # (experts here, …)
            came = begin_move(flat, [self._fetch] * len(flat), self.rank, self.group).arrive()
            every = [a.unflatten(1, b.shape[1:]) for a, b in zip(came, matrices, strict=True)]
            return local(x, *by_expert(experts, weights, self.homes.experts), *every)

        y: Tensor = checkpoint(
            fetched, x, weights, *matrices, use_reentrant=False, preserve_rng_state=False
        )
        return y

    @cached_property
    def _fetch(self) -> Table:
        """How matrices travel to all ranks: an expert's comes from its home as seen from there."""
        ranks = range(self.ranks)
        mine = slice(self.first, self.first + self.here)
        to = [r for r in ranks if (self.homes.seen_from(r)[mine] == self.rank).all()]
        device = self._home.device
        gives = PeerRows(
            dict.fromkeys(to, self.here), torch.arange(self.here, device=device).repeat(len(to))
        )
        came = _counts(np.bincount(self.homes.seen_from(self.rank), minlength=self.ranks))
        takes = PeerRows(came, torch.arange(self.homes.experts, device=device))
        return Table(gives, takes, self.homes.experts)

    def _bytes(self, matrices: Sequence[Tensor]) -> int:
        """What all ranks get if matrices travel: in both passes, and their gradients back."""
        an_expert = sum(m[0].numel() * m.element_size() for m in matrices)
        held = int(np.diff(self.homes.bounds).sum())
        return 3 * an_expert * (self.ranks * self.homes.experts - held)

    def _told(self, mine: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What every rank sends to every other: `mine` (3, ranks) -> three of (ranks, ranks).

        The host waits here for the device, and nowhere else.
        """
        every = mine.new_empty((self.ranks, *mine.shape), dtype=torch.int32)
        with waiting_for(None):
            dist.all_gather(list(every), mine.to(torch.int32), group=self.group)
        pairs, rows, between = every.cpu().numpy().astype(np.int64).swapaxes(0, 1)
        return pairs, rows, between

    def _waves(self, pairs: np.ndarray, rows: np.ndarray, most: float, chosen: int) -> int:
        """In how many waves no home gets more than `most` rows at a time.

        A wave's messages have an even share of the tokens, of which each may have all its experts
        there; with one token of each rank it is as small as it can be.

        Args:
            pairs: (ranks, ranks), tokens that each rank sends to each; rows: (ranks, ranks), rows.
        """
        if (rows.sum(0) <= most).all():
            return 1
        experts = np.diff(self.homes.bounds)[:, 0]
        room = np.maximum(most // np.minimum(chosen, experts), self.ranks)  # (ranks,): tokens

        def fits(waves: int) -> bool:
            return bool(((-(-pairs // waves)).sum(0) <= room).all())

        return 1 + bisect_left(range(1, int(pairs.max())), True, key=fits)

    def _at_home(self, matrices: Sequence[Tensor], rows: int | None) -> Callable[[Local], _Use]:
        """What this rank's experts make of tokens; rows: how many they are, if that is known."""

        def of(local: Local) -> _Use:
            def use(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
                here = experts - self.first
                here = here.masked_fill((here < 0) | (here >= self.here), self.here)
                tokens, factors, ends = by_expert(here, weights, self.here)
                return local(x, tokens[:rows], factors[:rows], ends, *matrices)

            return use

        return of

    def _inside(self, use: _Use, pairs: np.ndarray) -> _Use:
        """What a proxy does: send tokens on to the homes on its node, where `use` is made of them.

        Args:
            pairs: (ranks, ranks), tokens that each proxy sends to each home.
        """

        def on(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            route = _route(self._home[experts], self.ranks)
            return self._send(experts, route, pairs, x, weights)(use).to(x.dtype)

        return on

    def _send(
        self,
        experts: Tensor,
        route: _Route,
        pairs: np.ndarray,
        x: Tensor,
        weights: Tensor,
        wave: int = 0,
        waves: int = 1,
    ) -> Callable[[_Use], Tensor]:
        """Begin to send tokens along a route; the function returned makes something of those that
        come and sends it back.

        Args:
            pairs: (ranks, ranks), tokens that each rank sends to each. Of each message goes the
                part that is number `wave` of `waves`.

        Returns:
            a function whose result is (t, D), sums over the ranks that a token went to, in the
            dtype of sums.
        """
        lows, highs = pairs * wave // waves, pairs * (wave + 1) // waves
        begins = np.cumsum(pairs[self.rank]) - pairs[self.rank]
        at = [
            (b + low, b + high)
            for b, low, high in zip(begins, lows[self.rank], highs[self.rank], strict=True)
        ]
        counts = _counts(highs[self.rank] - lows[self.rank])
        tokens, peers = torch.cat([route.sends[:, a:b] for a, b in at], dim=1)
        gives = PeerRows(counts, tokens)
        counts = _counts((highs - lows)[:, self.rank])
        takes = PeerRows(counts, torch.arange(sum(counts.values()), device=x.device))
        there = Table(gives, takes, len(takes.rows))

        # Of a token's experts those that it goes to this rank for.
        wanted = experts[tokens].masked_fill(
            route.target[tokens] != peers.unsqueeze(1), self.homes.experts
        )
        wanted, arrived = self._begin_numbers(wanted.to(torch.int16), there)
        transfer = begin_move([x, weights], [there, there], self.rank, self.group)

        def finish(use: _Use) -> Tensor:
            arrived()
            here, factors = transfer.arrive()  # (n, D), (n, k)
            y = use(here, wanted.long(), factors)
            back = Table(takes, gives, len(x), wide=True)
            return begin_move([y], [back], self.rank, self.group).arrive()[0]

        return finish

    def _begin_numbers(self, leaving: Tensor, table: Table) -> tuple[Tensor, Callable[[], None]]:
        """Begin to send rows of numbers, (n, k) int16, by a table: what comes, and the wait before
        which it may not be read."""
        came = leaving.new_empty(table.rows, leaving.shape[1])
        sends, receives = table.gives.split(leaving), table.takes.split(came)
        if self.rank in sends:
            receives.pop(self.rank).copy_(sends.pop(self.rank))
        # gloo sends no int16.
        wait = post(
            {peer: [part.view(torch.uint8)] for peer, part in sends.items()},
            {peer: [part.view(torch.uint8)] for peer, part in receives.items()},
            self.group,
        )
        return came, wait


class _Route(NamedTuple):
    """Which tokens go to which ranks, each once to a rank.

    Attributes:
        target: (t, k) int64, the rank for each of a token's experts; one past the last for none.
        sends: (2, t · k) int64, tokens and the ranks they go to, rank after rank and in order; what
            is left over at the end is unset.
        counts: (ranks,) int64, tokens for each rank.
    """

    target: Tensor
    sends: Tensor
    counts: Tensor


def _route(target: Tensor, ranks: int) -> _Route:
    t = max(len(target), 1)
    key = target * t + torch.arange(len(target), device=target.device).unsqueeze(1)
    key = key.flatten().sort().values
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    place = torch.where(first, first.cumsum(0) - 1, len(key))
    sends = key.new_zeros(2, len(key) + 1)
    sends.scatter_(1, place.expand(2, -1), torch.stack([key % t, key // t]))
    counts = key.new_zeros(ranks + 1).scatter_add_(0, key // t, first.long())
    return _Route(target, sends[:, :-1], counts[:-1])


def _counts(each: np.ndarray) -> dict[int, int]:
    """Of the ranks that have any."""
    return {int(peer): int(each[peer]) for peer in np.flatnonzero(each)}


def _moved(pairs: np.ndarray) -> int:
    """Of what each rank has for each other and itself, what leaves it."""
    return int(pairs.sum() - pairs.trace())
