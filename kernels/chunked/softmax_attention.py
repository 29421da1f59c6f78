"""Softmax attention tile by tile, on any device: torch's flash kernel for CPUs, or products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import accumulation_dtype

# Query rows that share one mask under a sliding window: each block of them looks at
# window + WINDOW_ROWS − 1 keys.
WINDOW_ROWS = 256


class Tiling(NamedTuple):
    """Where the sequences of q and of k begin and end, and which keys a query sees."""

    q_bounds: list[int]
    k_bounds: list[int]
    causal: bool
    window: int | None


class _Tile(NamedTuple):
    """Query rows × key rows of one sequence that are computed at once."""

    q: slice
    k: slice
    causal: bool = False  # square: query i sees the keys up to i, counted inside the tile
    lead: int | None = None  # band: query i sees the last `window` keys up to lead + i
    merge: bool = False  # an earlier tile has the same queries


def _tiles(tiling: Tiling, flash_tiles: bool) -> Iterator[_Tile]:
    """Tiles that together cover what may be seen; no query of a tile sees nothing in it.

    With `flash_tiles` a tile may have any number of queries, since no scores are stored.
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
        # The last `size` queries and keys face each other. Queries before them see
        # nothing; keys before them are seen by all.
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
    """What to add to the tile's scores: −inf outside the band."""
    if tile.lead is None:
        return None
    own = torch.arange(tile.q.stop - tile.q.start, device=like.device).unsqueeze(1) + tile.lead
    key = torch.arange(tile.k.stop - tile.k.start, device=like.device)
    seen = key <= own
    if window is not None:
        seen &= key > own - window
    return like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _heads_first(x: Tensor, rows: slice, width: int) -> Tensor:
    """Rows of (T, H, D) as (1, H, rows, width), zeros beyond D: the kernel wants one width."""
    block = x[rows]
    if block.shape[2] < width:
        block = F.pad(block, (0, width - block.shape[2]))
    return block.transpose(0, 1).unsqueeze(0)


def _has_flash(x: Tensor) -> bool:
    """Torch's flash kernel for CPUs; elsewhere (fp32 on a GPU, say) tiles are plain products."""
    return x.device.type == "cpu"


def _plain(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o (1, H, rows, width) and lse (1, H, rows) of a tile, grouped heads side by side."""
    s, values = _scores(q, k, mask, scale), v.to(accumulation_dtype(v.dtype)).unsqueeze(2)
    lse = s.logsumexp(-1, keepdim=True)
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
    """Gradients of a tile's q, k and v, given the whole rows' o and lse."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    p = (_scores(q, k, mask, scale) - lse.unflatten(1, groups).unsqueeze(-1)).exp()
    grouped = [x.to(p.dtype).unflatten(1, groups) for x in (do, o, q)]
    keys, values = (x.to(p.dtype).unsqueeze(2) for x in (k, v))
    ds = p * (grouped[0] @ values.mT - (grouped[0] * grouped[1]).sum(-1, keepdim=True)) * scale
    dk, dv = (ds.mT @ grouped[2]).sum(2), (p.mT @ grouped[0]).sum(2)
    return (ds @ keys).flatten(1, 2), dk, dv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(1, Hk, Hq / Hk, rows, keys), at least fp32."""
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))
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
        if dlse is not None:
            # ds = p ⊙ (do·v − ⟨do, o⟩ + dlse), and the kernel knows no dlse. A channel more,
            # with 1 in do, −dlse in o and 0 in v, puts it into ⟨do, o⟩ and nowhere else.
            width = -(-(max(q.shape[2], v.shape[2]) + 1) // 8) * 8
            do = F.pad(do, (0, width - do.shape[2]))
            o = F.pad(o, (0, width - o.shape[2]))
            do[..., -1] = 1
            o[..., -1] = -dlse
        return *backward(do, q, k, v, o, lse, ctx.tiling, ctx.scale), None, None


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
    """Gradients of q, k and v, given o and lse of whole rows; do and o may be wider than v."""
    width = max(q.shape[2], do.shape[2])
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    with_flash = _has_flash(q)
    for tile in _tiles(tiling, with_flash):
        sides = ((do, tile.q), (q, tile.q), (k, tile.k), (v, tile.k), (o, tile.q))
        inputs: list[Any] = [_heads_first(x, rows, width) for x, rows in sides]
        inputs.append(lse[tile.q].t().unsqueeze(0))
        band = _band(tile, tiling.window, q)
        if with_flash:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *inputs, 0.0, tile.causal, attn_mask=band, scale=scale
            )
        else:
            parts = _plain_backward(*inputs, mask=band, scale=scale)
        places = ((dq, tile.q), (dk, tile.k), (dv, tile.k))
        for (total, rows), part in zip(places, parts, strict=True):
            total[rows] += part[0].transpose(0, 1)[..., : total.shape[2]]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
