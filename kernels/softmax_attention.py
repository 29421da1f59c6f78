"""Softmax attention for packed sequences that can return its log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import flash
from kernels.packing import accumulation_dtype, check_cu_seqlens, device_bounds, host_bounds

# Query rows that share one mask under a sliding window: each block of them looks at
# window + WINDOW_ROWS − 1 keys.
WINDOW_ROWS = 256


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention inside each sequence.

        s_ij = scale · ⟨q_i, k_j⟩ for the keys j that i may see
        o_i  = Σ_j exp(s_ij − lse_i) · v_j,    lse_i = log Σ_j exp s_ij

    Query i of a sequence with lq queries and lk keys sees, if `causal`, the keys
    j ≤ i + lk − lq (aligned at the end, as in flash-attn), and with `window` only the last
    `window` of those, its own included.

    Args:
        q: (B, Tq, Hq, D), floating point.
        k: (B, Tk, Hk, D), Hq a multiple of Hk (query head h reads key head h // (Hq / Hk)).
        v: (B, Tk, Hk, Dv).
        cu_seqlens: (N + 1,) int, packed sequences as in `kernels.linear_attention`: B must
            be 1, empty sequences are allowed, query rows at or past `cu_seqlens[-1]` give
            o = 0 and lse = −inf.
        cu_seqlens_k: (N + 1,) int, the same for the rows of k and v; `cu_seqlens` unless
            given.
        causal: see above.
        window: number of tokens seen, at least 1; needs `causal`.
        scale: factor on the scores, `D ** -0.5` unless given.
        return_lse: return the log-sum-exp too.
        max_seqlen, max_seqlen_k: the longest sequence of q, and of k, or any number above. On
            a GPU these spare a wait for the device, which knows `cu_seqlens`.

    Returns:
        o (B, Tq, Hq, Dv) in the dtype of v; with `return_lse` also lse (B, Tq, Hq), fp32
        (fp64 for fp64 inputs), the natural logarithm. A row that sees nothing has o = 0 and
        lse = −inf. Gradients flow through both, so that parts of one softmax can be merged
        outside. Memory is linear in Tq + Tk; the backward keeps q, k, v, o, lse.

    Raises:
        ValueError: shapes or arguments do not fit together.

    Source: FlashAttention-2, Dao 2023 (arXiv 2307.08691).
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    _check(q, k, v, cu_seqlens, cu_seqlens_k, causal, window)
    B, Tq, Hq, D = q.shape
    Tk, Hk, Dv = v.shape[1:]
    scale = D**-0.5 if scale is None else scale
    if flash.usable(q, v) and q.numel() and k.numel():
        cu_q, cu_k = (
            device_bounds(B, T, cu, q.device).int()
            for T, cu in ((Tq, cu_seqlens), (Tk, cu_seqlens_k))
        )
        if max_seqlen_k is None:
            max_seqlen_k = max_seqlen
        packed = flash.Packed(
            cu_q,
            cu_k,
            max_q=_longest(max_seqlen, Tq, cu_seqlens),
            max_k=_longest(max_seqlen_k, Tk, cu_seqlens_k),
            causal=causal,
            window=window,
            scale=scale,
        )
        rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        o, lse = flash.FlashAttention.apply(*rows, packed)
        o = o.view(B, Tq, Hq, Dv)
        return (o, lse.view(B, Tq, Hq)) if return_lse else o
    q_bounds = host_bounds(B, Tq, cu_seqlens)
    k_bounds = host_bounds(B, Tk, cu_seqlens_k)
    o, lse = _SoftmaxAttention.apply(
        q.reshape(B * Tq, Hq, D),
        k.reshape(B * Tk, Hk, D),
        v.reshape(B * Tk, Hk, Dv),
        q_bounds,
        k_bounds,
        causal,
        window,
        scale,
    )
    o = o.view(B, Tq, Hq, Dv)
    return (o, lse.view(B, Tq, Hq)) if return_lse else o


def _longest(told: int | None, rows: int, cu_seqlens: Tensor | None) -> int:
    if told is not None or cu_seqlens is None:
        return rows if told is None else told
    return int(cu_seqlens.diff().max())


class _Tile(NamedTuple):
    """Query rows × key rows of one sequence that are computed at once."""

    q: slice
    k: slice
    causal: bool = False  # square: query i sees the keys up to i, counted inside the tile
    lead: int | None = None  # band: query i sees the last `window` keys up to lead + i
    merge: bool = False  # an earlier tile has the same queries


def _tiles(
    q_bounds: list[int], k_bounds: list[int], causal: bool, window: int | None, flash_tiles: bool
) -> Iterator[_Tile]:
    """Tiles that together cover what may be seen; no query of a tile sees nothing in it.

    With `flash_tiles` a tile may have any number of queries, since no scores are stored.
    """
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


class _SoftmaxAttention(torch.autograd.Function):
    """Tile by tile, on any device."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_bounds: list[int],
        k_bounds: list[int],
        causal: bool,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        width = max(q.shape[2], v.shape[2])
        o = v.new_zeros(*q.shape[:2], v.shape[2])
        lse = q.new_full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q.dtype))
        with_flash = _has_flash(q)
        for tile in _tiles(q_bounds, k_bounds, causal, window, with_flash):
            inputs: list[Any] = [
                _heads_first(x, rows, width) for x, rows in ((q, tile.q), (k, tile.k), (v, tile.k))
            ]
            band = _band(tile, window, q)
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
        ctx.tiling, ctx.scale = (q_bounds, k_bounds, causal, window), scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        width = max(q.shape[2], v.shape[2])
        if do is None:
            do = torch.zeros_like(o)
        if dlse is not None:
            # ds = p ⊙ (do·v − ⟨do, o⟩ + dlse), and the kernel knows no dlse. A channel more,
            # with 1 in do, −dlse in o and 0 in v, puts it into ⟨do, o⟩ and nowhere else.
            width = -(-(width + 1) // 8) * 8
            do = F.pad(do, (0, width - do.shape[2]))
            o = F.pad(o, (0, width - o.shape[2]))
            do[..., -1] = 1
            o[..., -1] = -dlse
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        with_flash = _has_flash(q)
        q_bounds, k_bounds, causal, window = ctx.tiling
        for tile in _tiles(q_bounds, k_bounds, causal, window, with_flash):
            sides = ((do, tile.q), (q, tile.q), (k, tile.k), (v, tile.k), (o, tile.q))
            inputs: list[Any] = [_heads_first(x, rows, width) for x, rows in sides]
            inputs.append(lse[tile.q].t().unsqueeze(0))
            band = _band(tile, window, q)
            if with_flash:
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *inputs, 0.0, tile.causal, attn_mask=band, scale=ctx.scale
                )
            else:
                parts = _plain_backward(*inputs, mask=band, scale=ctx.scale)
            places = ((dq, tile.q), (dk, tile.k), (dv, tile.k))
            for (total, rows), part in zip(places, parts, strict=True):
                total[rows] += part[0].transpose(0, 1)[..., : total.shape[2]]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 5


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
) -> None:
    """Shapes and arguments only: no value is read, so no device is waited for."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must have 4 dims; got {q.dim()}, {k.dim()}, {v.dim()}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"q, k, v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    B, _, Hq, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or k.shape[2] < 1 or Hq % k.shape[2]:
        raise ValueError(
            f"k must be ({B}, Tk, a divisor of {Hq} heads, {D}) beside q {tuple(q.shape)}; "
            f"got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be {(*k.shape[:3], 'Dv')}; got {tuple(v.shape)}")
    N, Nk = check_cu_seqlens(B, cu_seqlens), check_cu_seqlens(B, cu_seqlens_k)
    if (cu_seqlens is None) != (cu_seqlens_k is None) or Nk != N:
        raise ValueError(
            f"cu_seqlens has {N} sequences and cu_seqlens_k {Nk}; they must be the same, and "
            "cu_seqlens_k cannot come alone"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"window is {window} with causal={causal}; it must be at least 1, and causal true"
        )
