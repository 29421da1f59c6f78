"""Softmax attention of sequences that several ranks share: keys and values go round.

The layout is the plan's (`parallel.planning.layout.Ring`): each seat of a ring holds an early and
a late chunk of every sequence, and in every round meets one seat's block of keys and values, its
own first, while the next round's is on its way. Where several ranks share a seat, each has a slice
of the heads, and the ring turns for each slice as if there were no other. The parts of a
softmax are merged by their log-sum-exp:

    lse = log Σ_p exp lse_p        o = Σ_p exp(lse_p − lse) · o_p

The backward pass sends keys and values round once more; with o and lse of whole rows, each part
of a softmax has its gradients by itself. The gradients of a block add up behind
it, from member to member of a node; the last one there sends the node's sum to the owner. Sums
are fp32 in place, and in the dtype of the tokens under way: they take at most one node's ranks.

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
    """One call of the kernel: rows of a member's queries against rows of a block of keys.

    The `causal` ones, of a chunk against itself, are the first that their queries meet.
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
    """A round, for one member of the ring. Peers are ranks.

    Attributes:
        calls: what to compute on this round's block.
        tokens: of that block.
        source: who hands it over; None for the own one.
        sends: (peer, earlier step) of the blocks that this member hands on for this round.
        passes_to, passes_from: where the sum of this block's gradients goes (None: it stays),
            and whence one comes: inside a node that of the next round's block; in the last
            round of a node, that of the own block.
        last: of the rounds with blocks from one node.
    """

    calls: list[Call]
    tokens: int
    source: int | None
    sends: list[tuple[int, int]]
    passes_to: int | None
    passes_from: int
    last: bool


Share = list[Step]  # a member's part in a ring


def share(ring: Ring, member: int, device: torch.device) -> Share:
    """What `member` does in its ring's rounds."""
    seat, mine = divmod(member, ring.slices)
    grid, rounds = ring.ranks[:, :, mine], ring.rounds()
    nodes, each = grid.shape
    ranks = grid.reshape(-1)  # of this slice, by seat
    node, local = divmod(seat, each)
    met = {int(r.block[seat]): i for i, r in enumerate(rounds)}
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
    """Which queries of `seat` meet which keys of `block`: see `Ring`.

    Early and late chunks are two regions of a buffer; those of a single sequence are one.
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


Block = tuple[Tensor, Tensor, Tensor]  # q (T, Hq, D), k (T, Hk, D) and v (T, Hk, Dv)


def ring_attention(
    shares: list[Share], blocks: list[Block], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Causal attention of the rings' sequences.

    Args:
        shares: of this rank, in the plan's order of rings.
        blocks: of each ring, with this rank's slice of the heads.

    Returns:
        o (T, Hq, Dv) of each ring, in the dtype of v.
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
    each = iter(tensors)
    return zip(each, each, each, strict=True)


def _round_trip(
    mine: Share, k: Tensor, v: Tensor, group: dist.ProcessGroup | None
) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Each round with its block of keys and values; the next one travels meanwhile."""
    uses = {step: i for i, later in enumerate(mine) for _, step in later.sends}
    held = {0: (k, v)}
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
    """Start sending `sums` on; the function returned adds what came instead to its argument."""
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
    """The call's own o (T, Hq, Dv) and lse (T, Hq)."""
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
    """Of the call's q, k, v, where do, o and lse are those of the whole softmax."""
    found = kernels.softmax_attention_backward(
        *(x.unsqueeze(0) for x in (do, q, k, v, o, lse)),
        cu_seqlens=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens_k,
        causal=call.causal,
        max_seqlen=call.max_seqlen,
        max_seqlen_k=call.max_seqlen_k,
    )
    return tuple(x[0] for x in found)
