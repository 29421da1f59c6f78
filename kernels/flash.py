"""Softmax attention of packed sequences on a GPU: FlashAttention-2, by flash-attn or by torch.

flash-attn (the `gpu` extra) is taken where it is installed, torch's own build of the same
kernels otherwise. Both leave rows of no sequence as they find them and know no gradient of the
log-sum-exp; both are mended here.

Source: Dao 2023 (arXiv 2307.08691).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_WIDTH = 256  # of a head; gradients through the log-sum-exp take 8 of it


class Packed(NamedTuple):
    """Where the sequences lie, and which keys a query sees."""

    cu_q: Tensor  # (N + 1,) int32
    cu_k: Tensor
    max_q: int  # longest sequence, or any number above
    max_k: int
    causal: bool
    window: int | None
    scale: float

    @property
    def sides(self) -> tuple[int, int]:
        """Keys seen to the left of a query's own and to its right; −1 for all."""
        return (-1 if self.window is None else self.window - 1), (0 if self.causal else -1)


def usable(q: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel for these tensors."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and max(q.shape[-1], v.shape[-1]) <= MAX_WIDTH - 8


class FlashAttention(torch.autograd.Function):
    """q (Tq, Hq, D), k (Tk, Hk, D), v (Tk, Hk, Dv) → o (Tq, Hq, Dv), lse (Tq, Hq) fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        width = _rounded(max(q.shape[2], v.shape[2]))
        padded = [_widened(x, width) for x in (q, k, v)]
        out, raw_lse, chance = _forward(*padded, p=packed)
        # A row that sees nothing has o = 0 and, in these kernels, lse = +∞.
        owned = _owned(packed.cu_q, len(q))
        out = out.masked_fill(~owned[:, None, None], 0)
        lse = raw_lse.t().masked_fill(raw_lse.t().isposinf() | ~owned[:, None], float("-inf"))
        ctx.save_for_backward(q, k, v, out, raw_lse, chance)
        ctx.packed = packed
        ctx.set_materialize_grads(False)
        return out[..., : v.shape[2]], lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, raw_lse, chance = ctx.saved_tensors
        packed = ctx.packed
        if do is None:
            do = out.new_zeros(*out.shape[:2], v.shape[2])
        if dlse is not None:
            # ds = p ⊙ (do·v − ⟨do, o⟩ + dlse): a channel more, with 1 in do, −dlse in o and
            # 0 in v, puts dlse into ⟨do, o⟩ and nowhere else.
            width = _rounded(max(q.shape[2], v.shape[2]) + 1)
            do, out = _widened(do, width).clone(), _widened(out, width).clone()
            do[..., -1] = 1
            out[..., -1] = dlse.masked_fill(raw_lse.t().isposinf(), 0).neg()
        return *_gradients(do, q, k, v, out, raw_lse, chance, packed), None


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, from o and lse as `FlashAttention` gives them, or of wider rows."""
    raw_lse = lse.t().masked_fill(lse.t().isneginf(), float("inf")).contiguous()
    chance = torch.empty(2, dtype=torch.uint64, device=q.device)  # there is no dropout
    return _gradients(do, q, k, v, o, raw_lse, chance, packed)


def _gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    raw_lse: Tensor,
    chance: Any,
    p: Packed,
) -> tuple[Tensor, ...]:
    """From what the kernels gave themselves; do and out may be wider than v."""
    width = _rounded(max(q.shape[2], do.shape[2]))
    inputs = (_widened(x, width) for x in (do, out, q, k, v))
    results = []
    for x, gradient, cu_seqlens in zip(
        (q, k, v),
        _backward(*inputs, lse=raw_lse, chance=chance, p=p),
        (p.cu_q, p.cu_k, p.cu_k),
        strict=True,
    ):
        foreign = ~_owned(cu_seqlens, len(x))[:, None, None]
        results.append(gradient[..., : x.shape[2]].masked_fill(foreign, 0))
    return tuple(results)


def _rounded(width: int) -> int:
    return -(-width // 8) * 8


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x[..., :width].contiguous()


def _owned(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,) whether a row belongs to a sequence; no device is waited for."""
    return torch.arange(rows, device=cu_seqlens.device) < cu_seqlens[-1]


def _forward(q: Tensor, k: Tensor, v: Tensor, *, p: Packed) -> tuple[Tensor, Tensor, Any]:
    """o, lse (Hq, Tq), and what the backward wants to know of dropout, of which there is none."""
    left, right = p.sides
    if find_spec("flash_attn") is not None:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_forward

        out, lse, _, chance = _wrapped_flash_attn_varlen_forward(
            q, k, v, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.scale,
            causal=p.causal, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse, chance
    out, lse, chance, _, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.causal, False,
        scale=p.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse, chance


def _backward(
    do: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, lse: Tensor, chance: Any, p: Packed
) -> tuple[Tensor, ...]:
    left, right = p.sides
    if find_spec("flash_attn") is not None:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward

        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        _wrapped_flash_attn_varlen_backward(
            do, q, k, v, out, lse, *gradients, p.cu_q, p.cu_k, p.max_q, p.max_k,
            0.0, p.scale, p.causal, left, right, 0.0, None, False, rng_state=chance,
        )  # fmt: skip
        return gradients
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        do, q, k, v, out, lse, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.causal, chance, unused,
        scale=p.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
