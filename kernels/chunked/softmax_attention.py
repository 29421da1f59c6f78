"""Softmax attention tile by tile, on any device.

A tile is some queries by some keys of one sequence. On a CPU torch's flash kernel computes it,
elsewhere plain matrix products do. Tiles with the same queries are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import device_kind
from kernels.packing import accumulation_dtype

# Queries of one tile in a sliding window, or without the flash kernel. They share a mask over
# window + WINDOW_ROWS − 1 keys: more rows waste products, fewer make small ones.
WINDOW_ROWS = 256


class Tiling(NamedTuple):
    """Where the sequences of q and of k begin and end, and which keys a query sees."""

    q_bounds: list[int]  # N + 1 rows
    k_bounds: list[int]  # N + 1 rows
    causal: bool
    window: int | None


class _Tile(NamedTuple):
    """Query rows and key rows of one sequence that are computed at once."""

    q: slice
    k: slice
    causal: bool = False  # the tile is square; its query i sees its keys 0 to i
    lead: int | None = None  # its query i sees keys up to lead + i, the last `window` of them
    merge: bool = False  # an earlier tile has the same queries: merge the two


def _tiles(tiling: Tiling, flash_tiles: bool) -> Iterator[_Tile]:
    """Tiles that together hold every visible pair. Every query of a tile sees a key in it.

    With `flash_tiles` a tile may have any number of queries, since scores are not stored.
    """
    q_bounds, k_bounds, causal, window = tiling
    for n in range(len(q_bounds) - 1):
        q0, q1, k0, k1 = q_bounds[n], q_bounds[n + 1], k_bounds[n], k_bounds[n + 1]
        if q0 == q1 or k0 == k1:
            continue
        if not causal:
            step = q1 - q0 if flash_tiles else WINDOW_ROWS
            for start in range(q0, q1, step):
                yield _Tile(slice(start, min(start + step, q1)), slice(k0, k1))
            continue
        # The last `size` queries and the last `size` keys have the same positions. Earlier
        # queries see no key; earlier keys are seen by all queries (without a window).
        size = min(q1 - q0, k1 - k0)
        first_q, first_k = q1 - size, k1 - size
        if flash_tiles and (window is None or window >= k1 - k0):
            if k0 < first_k:
                yield _Tile(slice(q0, q1), slice(k0, first_k))
            yield _Tile(slice(first_q, q1), slice(first_k, k1), causal=True, merge=k0 < first_k)
            continue
        for start in range(0, size, WINDOW_ROWS):
            stop = min(start + WINDOW_ROWS, size)
            oldest = k0 if window is None else max(first_k + start - window + 1, k0)
            yield _Tile(
                slice(first_q + start, first_q + stop),
                slice(oldest, first_k + stop),
                lead=first_k + start - oldest,
            )


def _band(tile: _Tile, window: int | None, like: Tensor) -> Tensor | None:
    """The tile's mask (queries, keys), added to its scores: 0 or −inf. None if all are visible."""
    if tile.lead is None:
        return None
    own = torch.arange(tile.q.stop - tile.q.start, device=like.device).unsqueeze(1) + tile.lead
    key = torch.arange(tile.k.stop - tile.k.start, device=like.device)
    seen = key <= own
    if window is not None:
        seen &= key > own - window
    return like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _heads_first(x: Tensor, rows: slice, width: int) -> Tensor:
    """(T, H, D) -> (1, H, rows, width), zeros beyond D: the kernel takes one width for q, k, v."""
    block = x[rows]
    if block.shape[2] < width:
        block = F.pad(block, (0, width - block.shape[2]))
    return block.transpose(0, 1).unsqueeze(0)


def _has_flash(x: Tensor) -> bool:
    """Whether torch's flash kernel for CPUs can be used; elsewhere tiles are plain products."""
    return device_kind(x) == "cpu"


def _plain(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o (1, Hq, rows, width) and lse (1, Hq, rows) of a tile."""
    s, values = _scores(q, k, mask, scale), v.to(accumulation_dtype(v.dtype)).unsqueeze(2)
    lse = s.logsumexp(-1, keepdim=True)
    # (1, Hk, Hq / Hk, rows, width) -> (1, Hq, rows, width)
    return ((s - lse).exp() @ values).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)[..., 0]


def _plain_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a tile's q, k and v, given o and lse of whole rows; all (1, H, rows, width)."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    p = (_scores(q, k, mask, scale) - lse.unflatten(1, groups).unsqueeze(-1)).exp()
    grouped = [x.to(p.dtype).unflatten(1, groups) for x in (do, o, q)]
    keys, values = (x.to(p.dtype).unsqueeze(2) for x in (k, v))  # (1, Hk, 1, keys, width)
    ds = p * (grouped[0] @ values.mT - (grouped[0] * grouped[1]).sum(-1, keepdim=True)) * scale
    dk, dv = (ds.mT @ grouped[2]).sum(2), (p.mT @ grouped[0]).sum(2)
    # dq: (1, Hk, Hq / Hk, rows, width) -> (1, Hq, rows, width)
    return (ds @ keys).flatten(1, 2), dk, dv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(1, Hk, Hq / Hk, rows, keys) in fp32 (fp64 for fp64)."""
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))  # (1, Hq, …) -> (1, Hk, Hq / Hk, …)
    s = grouped @ k.to(dtype).unsqueeze(2).mT * scale
    return s if mask is None else s + mask


class TiledAttention(torch.autograd.Function):
    """q (Tq, Hq, D), k (Tk, Hk, D), v (Tk, Hk, Dv) → o (Tq, Hq, Dv), lse (Tq, Hq)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float
    ) -> tuple[Tensor, Tensor]:
        width = max(q.shape[2], v.shape[2])
        o = v.new_zeros(*q.shape[:2], v.shape[2])
        lse = q.new_full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q.dtype))
        with_flash = _has_flash(q)
        for tile in _tiles(tiling, with_flash):
            inputs: list[Any] = [
                _heads_first(x, rows, width) for x, rows in ((q, tile.q), (k, tile.k), (v, tile.k))
            ]
            band = _band(tile, tiling.window, q)
            if with_flash:
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *inputs, 0.0, tile.causal, attn_mask=band, scale=scale
                )
            else:
                part, part_lse = _plain(*inputs, mask=band, scale=scale)
            # (1, Hq, rows, width) -> (rows, Hq, Dv); (1, Hq, rows) -> (rows, Hq)
            part, part_lse = part[0].transpose(0, 1)[..., : v.shape[2]], part_lse[0].t()
            rows = tile.q
            if tile.merge:
                merged = torch.logaddexp(lse[rows], part_lse)
                o[rows] *= (lse[rows] - merged).exp().unsqueeze(-1)
                part, part_lse = part * (part_lse - merged).exp().unsqueeze(-1), merged
                o[rows] += part
            else:
                o[rows] = part
            lse[rows] = part_lse
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.tiling, ctx.scale = tiling, scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        return *gradients(do, dlse, q, k, v, o, lse, ctx.tiling, ctx.scale), None, None


def gradients(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    tiling: Tiling,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, with the gradient of lse (Tq, Hq) too; None is zero."""
    if dlse is not None:
        # ds = p ⊙ (do·v − ⟨do, o⟩ + dlse), but the kernel has no dlse. An extra channel with
        # 1 in do, −dlse in o and 0 in v adds −dlse to ⟨do, o⟩ and changes nothing else.
        width = -(-(max(q.shape[2], v.shape[2]) + 1) // 8) * 8
        do = F.pad(do, (0, width - do.shape[2]))
        o = F.pad(o, (0, width - o.shape[2]))
        do[..., -1] = 1
        o[..., -1] = -dlse
    return backward(do, q, k, v, o, lse, tiling, scale)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    tiling: Tiling,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given o and lse of whole rows.

    Args:
        do, o: (Tq, Hq, Dv or more channels).
        lse: (Tq, Hq).
    """
    width = max(q.shape[2], do.shape[2])
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    with_flash = _has_flash(q)
    for tile in _tiles(tiling, with_flash):
        sides = ((do, tile.q), (q, tile.q), (k, tile.k), (v, tile.k), (o, tile.q))
        inputs: list[Any] = [_heads_first(x, rows, width) for x, rows in sides]
        inputs.append(lse[tile.q].t().unsqueeze(0))  # (rows, Hq) -> (1, Hq, rows)
        band = _band(tile, tiling.window, q)
        if with_flash:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *inputs, 0.0, tile.causal, attn_mask=band, scale=scale
            )
        else:
            parts = _plain_backward(*inputs, mask=band, scale=scale)
        places = ((dq, tile.q), (dk, tile.k), (dv, tile.k))
        for (total, rows), part in zip(places, parts, strict=True):
            # (1, H, rows, width) -> (rows, H, D)
            total[rows] += part[0].transpose(0, 1)[..., : total.shape[2]]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
