"""Softmax attention for packed sequences, with its log-sum-exp if wanted.

On a GPU in bf16 or fp16 it calls FlashAttention (`kernels.flash`), elsewhere it works tile by tile
(`kernels.chunked.softmax_attention`).
"""

from __future__ import annotations

from torch import Tensor

from kernels import flash
from kernels.chunked import softmax_attention as attention_tiles
from kernels.packing import check_cu_seqlens, device_bounds, host_bounds


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
        max_seqlen, max_seqlen_k: tokens of the longest sequence of q, and of k, or more. Unless
            given, they are computed from `cu_seqlens`, for which the CPU waits for a GPU.

    Returns:
        o (B, Tq, Hq, Dv) in the dtype of v; with `return_lse` also lse (B, Tq, Hq), fp32
        (fp64 for fp64 inputs), the natural logarithm. A row that sees nothing has o = 0 and
        lse = −inf. Both are differentiable, so that the caller can merge parts of one softmax.
        Memory is linear in Tq + Tk; the backward keeps q, k, v, o, lse.

    Raises:
        ValueError: shapes or arguments do not fit together.

    Source: FlashAttention-2, Dao 2023 (arXiv 2307.08691).
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    _check(q, k, v, cu_seqlens, cu_seqlens_k, causal, window)
    B, Tq, Hq, D = q.shape
    Dv = v.shape[3]
    scale = D**-0.5 if scale is None else scale
    if flash.usable(q, v) and q.numel() and k.numel():
        longest = max_seqlen, max_seqlen_k
        packed = _packed(q, k, cu_seqlens, cu_seqlens_k, longest, causal, window, scale)
        o, lse = flash.FlashAttention.apply(*_rows(q, k, v), packed)
    else:
        tiling = _tiling(q, k, cu_seqlens, cu_seqlens_k, causal, window)
        o, lse = attention_tiles.TiledAttention.apply(*_rows(q, k, v), tiling, scale)
    o = o.view(B, Tq, Hq, Dv)  # (B · Tq, Hq, Dv) -> (B, Tq, Hq, Dv)
    return (o, lse.view(B, Tq, Hq)) if return_lse else o


def softmax_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms that the given keys contribute to the gradients of a softmax over more keys.

        p_ij = exp(s_ij − lse_i)        ds_ij = scale · p_ij · (⟨do_i, v_j⟩ − ⟨do_i, o_i⟩)
        dq_i = Σ_j ds_ij k_j        dk_j = Σ_i ds_ij q_i        dv_j = Σ_i p_ij do_i

    o and lse are those of whole rows; k and v are all or some of the keys that the rows saw. Summed
    over disjoint parts of the keys, the results are the gradients of the whole softmax. So ranks of
    a ring need not keep o and lse of each part.

    Args:
        do, o: (B, Tq, Hq, Dv), in the dtype of v.
        lse: (B, Tq, Hq), fp32 (fp64 for fp64 inputs).
        q, k, v and the rest: as in `softmax_attention`.

    Returns:
        dq, dk, dv, like q, k, v; zero in rows of no sequence.

    Raises:
        ValueError: shapes or arguments do not fit together.

    Source: FlashAttention-2, Dao 2023 (arXiv 2307.08691), algorithm 2.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    _check(q, k, v, cu_seqlens, cu_seqlens_k, causal, window)
    wanted = (*q.shape[:3], v.shape[3])
    if do.shape != wanted or o.shape != wanted or lse.shape != wanted[:3]:
        raise ValueError(
            f"do and o must be {wanted} and lse {wanted[:3]}; got {tuple(do.shape)}, "
            f"{tuple(o.shape)} and {tuple(lse.shape)}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    do, q_rows, k_rows, v_rows, o, lse = _rows(do, q, k, v, o, lse)
    if flash.usable(q, v) and q.numel() and k.numel():
        longest = max_seqlen, max_seqlen_k
        packed = _packed(q, k, cu_seqlens, cu_seqlens_k, longest, causal, window, scale)
        found = flash.backward(do, q_rows, k_rows, v_rows, o, lse, packed)
    else:
        tiling = _tiling(q, k, cu_seqlens, cu_seqlens_k, causal, window)
        found = attention_tiles.backward(do, q_rows, k_rows, v_rows, o, lse, tiling, scale)
    dq, dk, dv = (x.view_as(like) for x, like in zip(found, (q, k, v), strict=True))
    return dq, dk, dv


def _rows(*tensors: Tensor) -> list[Tensor]:
    """(B, T, …) -> (B · T, …), one stream."""
    return [x.reshape(-1, *x.shape[2:]) for x in tensors]


def _tiling(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
) -> attention_tiles.Tiling:
    sides = (q, cu_seqlens), (k, cu_seqlens_k)
    q_bounds, k_bounds = (host_bounds(len(x), x.shape[1], cu) for x, cu in sides)
    return attention_tiles.Tiling(q_bounds, k_bounds, causal, window)


def _packed(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    longest: tuple[int | None, int | None],
    causal: bool,
    window: int | None,
    scale: float,
) -> flash.Packed:
    sides = (q, cu_seqlens), (k, cu_seqlens_k)
    cu_q, cu_k = (device_bounds(len(x), x.shape[1], cu, q.device).int() for x, cu in sides)
    return flash.Packed(
        cu_q,
        cu_k,
        max_q=_longest(longest[0], q.shape[1], cu_seqlens),
        max_k=_longest(longest[0] if longest[1] is None else longest[1], k.shape[1], cu_seqlens_k),
        causal=causal,
        window=window,
        scale=scale,
    )


def _longest(told: int | None, rows: int, cu_seqlens: Tensor | None) -> int:
    if told is not None or cu_seqlens is None:
        return rows if told is None else told
    return int(cu_seqlens.diff().max())


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
) -> None:
    """Check shapes and arguments. No value is read, so no device is waited for."""
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
