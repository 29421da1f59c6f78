"""Softmax attention of packed sequences on a GPU: FlashAttention-2, by flash-attn or by torch.

flash-attn (the `gpu` extra) is used if it is installed, else torch's own build of the same kernels.
Neither writes rows that belong to no sequence, nor has a gradient of the log-sum-exp; both are
added here.

Source: Dao 2023 (arXiv 2307.08691).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import device_kind
from kernels.chunked import softmax_attention as attention_tiles

MAX_WIDTH = 256  # channels of a head that the kernels take


class Packed(NamedTuple):
    """Where the sequences begin and end, and which keys a query sees."""

    cu_q: Tensor  # (N + 1,) int32, `cu_seqlens` of q
    cu_k: Tensor  # (N + 1,) int32, of k and v
    max_q: int  # tokens of the longest sequence of q, or more
    max_k: int  # of k
    causal: bool
    window: int | None
    scale: float

    @property
    def sides(self) -> tuple[int, int]:
        """How many keys a query sees before its own position, and after it; −1: all."""
        return (-1 if self.window is None else self.window - 1), (0 if self.causal else -1)


def usable(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these tensors: bf16 or fp16 on a GPU, heads not too wide."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return device_kind(q) == "cuda" and half and max(q.shape[-1], v.shape[-1]) <= MAX_WIDTH


class FlashAttention(torch.autograd.Function):
    """q (Tq, Hq, D), k (Tk, Hk, D), v (Tk, Hk, Dv) → o (Tq, Hq, Dv), lse (Tq, Hq) fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        width = _rounded(max(q.shape[2], v.shape[2]))
        padded = [_widened(x, width) for x in (q, k, v)]
        out, raw_lse, rng_state = _forward(*padded, p=packed)
        # For a row that sees no key these kernels give o = 0 and lse = +∞; we promise −∞.
        in_sequence = _in_sequence(packed.cu_q, len(q))
        out = out.masked_fill(~in_sequence[:, None, None], 0)
        # (Hq, Tq) -> (Tq, Hq)
        lse = raw_lse.t().masked_fill(raw_lse.t().isposinf() | ~in_sequence[:, None], float("-inf"))
        ctx.save_for_backward(q, k, v, out, raw_lse, rng_state)
        ctx.packed = packed
        ctx.set_materialize_grads(False)
        return out[..., : v.shape[2]], lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, raw_lse, rng_state = ctx.saved_tensors
        packed = ctx.packed
        if do is None:
            do = out.new_zeros(*out.shape[:2], v.shape[2])
        if dlse is not None:
            # ds = p ⊙ (do·v − ⟨do, o⟩ + dlse), but the kernels have no dlse. An extra channel with
            # 1 in do, −dlse in o and 0 in v adds −dlse to ⟨do, o⟩ and changes nothing else.
            width = _rounded(max(q.shape[2], v.shape[2]) + 1)
            if width > MAX_WIDTH:  # no room for it; training asks for no such gradient
                tiling = attention_tiles.Tiling(
                    packed.cu_q.tolist(), packed.cu_k.tolist(), packed.causal, packed.window
                )
                lse = raw_lse.t().masked_fill(raw_lse.t().isposinf(), float("-inf"))
                found = attention_tiles.gradients(
                    do, dlse, q, k, v, out[..., : v.shape[2]], lse, tiling, packed.scale
                )
                return *found, None
            do, out = _widened(do, width).clone(), _widened(out, width).clone()
            do[..., -1] = 1
            out[..., -1] = dlse.masked_fill(raw_lse.t().isposinf(), 0).neg()
        return *_gradients(do, q, k, v, out, raw_lse, rng_state, packed), None


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, given o and lse of whole rows in the form `FlashAttention` returns.

    The rows may have seen more keys than are given here.
    """
    raw_lse = lse.t().masked_fill(lse.t().isneginf(), float("inf")).contiguous()  # -> (Hq, Tq)
    rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # there is no dropout
    return _gradients(do, q, k, v, o, raw_lse, rng_state, packed)


def _gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    raw_lse: Tensor,
    rng_state: Any,
    p: Packed,
) -> tuple[Tensor, ...]:
    """Gradients from o and lse as the kernels returned them; do and out may be wider than v."""
    width = _rounded(max(q.shape[2], do.shape[2]))
    inputs = (_widened(x, width) for x in (do, out, q, k, v))
    results = []
    for x, gradient, cu_seqlens in zip(
        (q, k, v),
        _backward(*inputs, lse=raw_lse, rng_state=rng_state, p=p),
        (p.cu_q, p.cu_k, p.cu_k),
        strict=True,
    ):
        foreign = ~_in_sequence(cu_seqlens, len(x))[:, None, None]
        results.append(gradient[..., : x.shape[2]].masked_fill(foreign, 0))
    return tuple(results)


def _rounded(width: int) -> int:
    """The next multiple of 8, as the kernels need."""
    return -(-width // 8) * 8


def _widened(x: Tensor, width: int) -> Tensor:
    """(T, H, D) -> (T, H, width), zeros in the channels added."""
    return F.pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x[..., :width].contiguous()


def _in_sequence(cu_seqlens: Tensor, rows: int) -> Tensor:
    """bool (rows,), whether a row belongs to a sequence; without waiting for the device."""
    return torch.arange(rows, device=cu_seqlens.device) < cu_seqlens[-1]


def _forward(q: Tensor, k: Tensor, v: Tensor, *, p: Packed) -> tuple[Tensor, Tensor, Any]:
    """o (Tq, Hq, D), lse (Hq, Tq), and the random state of dropout, which the backward takes though
    there is no dropout."""
    left, right = p.sides
    if find_spec("flash_attn") is not None:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_forward

        out, lse, _, rng_state = _wrapped_flash_attn_varlen_forward(
            q, k, v, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.scale,
            causal=p.causal, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse, rng_state
    out, lse, rng_state, _, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.causal, False,
        scale=p.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse, rng_state


def _backward(
    do: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lse: Tensor,
    rng_state: Any,
    p: Packed,
) -> tuple[Tensor, ...]:
    left, right = p.sides
    if find_spec("flash_attn") is not None:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward

        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        _wrapped_flash_attn_varlen_backward(
            do, q, k, v, out, lse, *gradients, p.cu_q, p.cu_k, p.max_q, p.max_k,
            0.0, p.scale, p.causal, left, right, 0.0, None, False, rng_state=rng_state,
        )  # fmt: skip
        return gradients
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        do, q, k, v, out, lse, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.causal, rng_state, unused,
        scale=p.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
