"""Softmax attention of sequences that several ranks share: keys and values go round a ring.

The layout is the plan's (`parallel.planning.layout.Ring`): each seat of a ring holds an early and
a late chunk of every sequence. In every round it attends to one seat's block of keys and values,
its own first, while the next round's block travels. If several ranks share a seat, each has a
slice of the heads, and each slice has a ring of its own. The parts of a softmax are merged by
their log-sum-exp:

    lse = log Σ_p exp lse_p        o = Σ_p exp(lse_p − lse) · o_p

The backward pass sends keys and values round again. Given o and lse of whole rows, the gradients of
each part can be computed by themselves (`kernels.softmax_attention_backward`). The gradients of a
block are summed from member to member inside a node; the last of them sends the node's sum to the
block's owner. Sums are fp32 (fp64 for fp64 tokens) where they are computed, and in the dtype of the
tokens when they are sent: a sum that travels has terms of one node's ranks at most.

Tried and left: running each part's forward pass again, for that part's own o and lse.

Sources: Ring Attention, Liu et al. 2023 (arXiv 2310.01889); Zeppelin (arXiv 2509.21841); heads
inside a seat: USP, Fang and Zhao 2024 (arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import kernels
from kernels.packing import accumulation_dtype
from parallel.planning.layout import Ring
from parallel.travel.exchange import post, to_device


class Call(NamedTuple):
    """One call of the kernel: rows `q` of a member's queries on rows `k` of a block of keys.

    A `causal` call (a chunk on itself) is the first one for its queries: it sets o and lse, and
    later calls are merged into them.
    """

    q: slice
    k: slice
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    max_seqlen: int
    max_seqlen_k: int
    causal: bool


Region = tuple[slice, np.ndarray]  # rows, and the lengths of the chunks in them


class Step(NamedTuple):
    """One round, for one member of the ring. Peers are given as ranks.

    Attributes:
        calls: what to compute on this round's block.
        tokens: of that block.
        source: the rank that sends it; None if it is the member's own.
        sends: (peer, step) for each block that this member sends on for this round; it received
            it for the earlier `step`.
        passes_to: the rank that gets the sum of this block's gradients so far; None: it stays.
        passes_from: the rank that a sum comes from in exchange: of the next round's block, or
            after the last round with a node's blocks, of the own block.
        last: whether this is the last round with blocks of one node.
    """

    calls: list[Call]
    tokens: int
    source: int | None
    sends: list[tuple[int, int]]
    passes_to: int | None
    passes_from: int
    last: bool


Share = list[Step]  # a member's rounds


def share(ring: Ring, member: int, device: torch.device) -> Share:
    """The rounds of one member of a ring."""
    seat, mine = divmod(member, ring.slices)
    grid, rounds = ring.ranks[:, :, mine], ring.rounds()  # grid (nodes, seats a node)
    nodes, each = grid.shape
    ranks = grid.reshape(-1)  # (G,): this slice's rank on each seat
    node, local = divmod(seat, each)
    met = {int(r.block[seat]): i for i, r in enumerate(rounds)}  # block -> round
    steps = []
    for i, r in enumerate(rounds):
        block, outer, last = int(r.block[seat]), i // each, i % each == each - 1
        away = outer if last else 0
        takers = np.flatnonzero(r.source == seat)
        steps.append(
            Step(
                calls=_calls(ring, seat, block, device),
                tokens=int(ring.tokens[block]),
                source=int(ranks[r.source[seat]]) if i else None,
                sends=[(int(ranks[s]), met[int(r.block[s])]) for s in takers] if i else [],
                passes_to=int(grid[(node - away) % nodes, (local + 1) % each]) if i else None,
                passes_from=int(grid[(node + away) % nodes, (local - 1) % each]),
                last=last,
            )
        )
    return steps


def _calls(ring: Ring, seat: int, block: int, device: torch.device) -> list[Call]:
    """Which queries of `seat` see which keys of `block`, by the rule of `Ring`.

    A block's early chunks and its late chunks are two regions. With a single sequence they are one:
    the two chunks are in order, so that one causal call does for both.
    """

    def regions(of: int) -> tuple[list[Region], Region, Region]:
        early, late = ring.early[of], ring.late[of]
        middle = int(early.sum())
        end = middle + int(late.sum())
        first, second = (slice(0, middle), early), (slice(middle, end), late)
        both = [(slice(0, end), early + late)] if len(early) == 1 else [first, second]
        return both, first, second

    queries, _, late_queries = regions(seat)
    keys, early_keys, _ = regions(block)
    if block == seat:
        pairs = [(q, k, True) for q, k in zip(queries, keys, strict=True)]
        if len(queries) > 1:
            pairs.append((late_queries, early_keys, False))
    elif block < seat:
        pairs = [(q, early_keys, False) for q in queries]
    else:
        pairs = [(late_queries, k, False) for k in keys]
    return [
        Call(
            q,
            k,
            _cumulative(q_lengths, device),
            _cumulative(k_lengths, device),
            int(q_lengths.max()),
            int(k_lengths.max()),
            causal,
        )
        for (q, q_lengths), (k, k_lengths), causal in pairs
        if q.stop > q.start and k.stop > k.start
    ]


def _cumulative(lengths: np.ndarray, device: torch.device) -> Tensor:
    return to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)


Block = tuple[Tensor, Tensor, Tensor]  # q (n, Hq, D), k (n, Hk, D), v (n, Hk, Dv): n rows of a ring


def ring_attention(
    shares: list[Share], blocks: list[Block], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Causal attention of the rings' sequences.

    Args:
        shares: this rank's rounds in each ring, in the plan's order of rings.
        blocks: this rank's q, k and v in each ring, with its slice of the heads.

    Returns:
        o (n, Hq, Dv) of each ring, in the dtype of v.
    """
    return list(_Rings.apply(shares, group, *(x for block in blocks for x in block)))


class _Rings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shares: list[Share], group: dist.ProcessGroup | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        results, statistics = [], []
        for mine, (q, k, v) in zip(shares, _threes(tensors), strict=True):
            dtype = accumulation_dtype(q.dtype)
            o = q.new_empty(*q.shape[:2], v.shape[2], dtype=dtype)
            lse = q.new_empty(q.shape[:2], dtype=dtype)
            for step, *block in _round_trip(mine, k, v, group):
                for call in step.calls:
                    part, part_lse = _attend(call, q[call.q], *(x[call.k] for x in block))
                    if call.causal:
                        o[call.q], lse[call.q] = part, part_lse
                        continue
                    merged = torch.logaddexp(lse[call.q], part_lse)
                    o[call.q] *= (lse[call.q] - merged).exp_().unsqueeze(-1)
                    o[call.q] += part * (part_lse - merged).exp_().unsqueeze(-1)
                    lse[call.q] = merged
            results.append(o.to(v.dtype))
            statistics.append(lse)
        ctx.save_for_backward(*tensors, *results, *statistics)
        ctx.shares, ctx.group = shares, group
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *dos: Tensor) -> tuple[Any, ...]:
        n = len(ctx.shares)
        saved = ctx.saved_tensors
        found: list[Tensor] = []
        for mine, (q, k, v), o, lse, do in zip(
            ctx.shares, _threes(saved[: 3 * n]), saved[3 * n : 4 * n], saved[4 * n :], dos,
            strict=True,
        ):  # fmt: skip
            dq, *own = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
            arrive: Callable[[list[Tensor]], None] | None = None
            for i, (step, *block) in enumerate(_round_trip(mine, k, v, ctx.group)):
                sums = [torch.zeros_like(x, dtype=lse.dtype) for x in block]
                for call in step.calls:
                    keys = (x[call.k] for x in block)
                    part = _gradients(call, q[call.q], *keys, *(x[call.q] for x in (do, o, lse)))
                    _add([dq[call.q], *(total[call.k] for total in sums)], part)
                if arrive is not None:
                    arrive(own if mine[i - 1].last else sums)
                    arrive = None
                if step.passes_to is None:
                    _add(own, sums)
                else:
                    tokens = len(k) if step.last else mine[i + 1].tokens
                    leaving = [x.to(k.dtype) for x in sums]
                    arrive = _pass_on(step, leaving, tokens, ctx.group)
            if arrive is not None:
                arrive(own)
            found += [dq.to(q.dtype), *(x.to(k.dtype) for x in own)]
        return None, None, *found


def _threes(tensors: Sequence[Tensor]) -> Iterator[Block]:
    """(q, k, v, q, k, v, …) -> (q, k, v), (q, k, v), …."""
    each = iter(tensors)
    return zip(each, each, each, strict=True)


def _round_trip(
    mine: Share, k: Tensor, v: Tensor, group: dist.ProcessGroup | None
) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Each round with its block of keys and values; the next round's travels meanwhile."""
    uses = {step: i for i, later in enumerate(mine) for _, step in later.sends}  # last use
    held = {0: (k, v)}  # blocks by the round they are used in, kept until they are sent on
    arriving, wait = (k, v), None
    for i, step in enumerate(mine):
        if wait is not None:
            wait()
            held[i] = arriving
        block = held[i]
        if i + 1 < len(mine):
            following = mine[i + 1]
            assert following.source is not None
            arriving = (
                k.new_empty(following.tokens, *k.shape[1:]),
                v.new_empty(following.tokens, *v.shape[1:]),
            )
            sends: dict[int, list[Tensor]] = {}
            for peer, met in following.sends:
                sends.setdefault(peer, []).extend(x.contiguous() for x in held[met])
            wait = post(sends, {following.source: list(arriving)}, group)
        held = {met: x for met, x in held.items() if uses.get(met, 0) > i + 1}
        yield step, *block


def _pass_on(
    step: Step, sums: list[Tensor], tokens: int, group: dist.ProcessGroup | None
) -> Callable[[list[Tensor]], None]:
    """Start sending `sums` on. The function returned adds the sums received to its argument.

    Args:
        tokens: number of rows of the sums that come.
    """
    arriving = [x.new_empty(tokens, *x.shape[1:]) for x in sums]
    assert step.passes_to is not None
    wait = post({step.passes_to: sums}, {step.passes_from: arriving}, group)

    def arrive(targets: list[Tensor]) -> None:
        wait()
        _add(targets, arriving)

    return arrive


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o (rows, Hq, Dv) and lse (rows, Hq) over the keys of this call alone."""
    o, lse = kernels.softmax_attention(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        cu_seqlens=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens_k,
        causal=call.causal,
        return_lse=True,
        max_seqlen=call.max_seqlen,
        max_seqlen_k=call.max_seqlen_k,
    )
    return o[0], lse[0]


def _gradients(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the call's q, k and v, given do, o and lse of whole softmax rows."""
    found = kernels.softmax_attention_backward(
        *(x.unsqueeze(0) for x in (do, q, k, v, o, lse)),
        cu_seqlens=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens_k,
        causal=call.causal,
        max_seqlen=call.max_seqlen,
        max_seqlen_k=call.max_seqlen_k,
    )
    return tuple(x[0] for x in found)
