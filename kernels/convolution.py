"""Short causal depthwise convolution: the few tokens of local context before a linear mixer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.packing import Block, accumulation_dtype, blocks, check_cu_seqlens, host_bounds

# Elements of a block of rows, 512 KB in fp32. The convolution reads each input W times; a block of
# this size stays in a core's cache meanwhile, which makes it twice as fast on a CPU.
BLOCK_ELEMENTS = 1 << 17


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel with its own filter over the current and the last W − 1 tokens.

        y_t = activation(bias + Σ_{j<W} weight[:, W − 1 − j] · x_{t−j})

    Args:
        x: (B, T, D), floating point.
        weight: (D, W); `weight[:, -1]` multiplies the current token.
        bias: (D,) or None.
        activation: "silu" or None.
        initial_state: (N, W − 1, D), the inputs just before each sequence's first row,
            oldest first (a carried halo). Zeros unless given.
        output_final_state: return the last W − 1 inputs of each sequence too, reaching
            back into `initial_state` where the sequence is shorter.
        cu_seqlens: (N + 1,) int, packed sequences as in `kernels.linear_attention`: B must
            be 1, empty sequences are allowed, rows at or past `cu_seqlens[-1]` give zeros
            and take no gradient.
        backend: "triton" (GPU), "torch" (any device), or "auto".

    Returns:
        y (B, T, D) in the dtype of x, and the final state (N, W − 1, D) in the dtype of x,
        or None. Sums are fp32 (fp64 for fp64 inputs). Everything but `cu_seqlens` is
        differentiable, through the final state too. The backward keeps the inputs alone.

    Raises:
        ValueError: shapes or arguments do not fit together.
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    B, T, D = x.shape
    if use_triton(backend, x):
        from kernels.triton import convolution as compiled

        y, final_state = compiled.short_convolution(
            x, weight, bias, activation == "silu", initial_state, cu_seqlens
        )
        return y, final_state if output_final_state else None
    bounds = host_bounds(B, T, cu_seqlens)
    y, final_state = _ShortConvolution.apply(
        x.reshape(B * T, D), weight, bias, initial_state, activation == "silu", bounds
    )
    return y.view(B, T, D), final_state if output_final_state else None


def _blocks(bounds: list[int], weight: Tensor) -> Iterator[Block]:
    D, W = weight.shape
    # At least W rows: then only a sequence's first block reads rows before the sequence's start.
    return blocks(bounds, max(BLOCK_ELEMENTS // max(D, 1), W))


def _filter(window: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """(L + W − 1, D) inputs and (W, D) taps -> (L, D), before the activation."""
    W = len(taps)
    length = len(window) - W + 1
    total = window[W - 1 :] * taps[W - 1]
    for i in range(W - 1):
        total.addcmul_(window[i : i + length], taps[i])
    return total if bias is None else total.add_(bias)


class _ShortConvolution(torch.autograd.Function):
    """Shifted multiply-adds, one cache-sized block of one sequence after the other.

    `F.conv1d(groups=D)` does the same 10 to 20 times slower on a CPU, and knows no packing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        silu: bool,
        bounds: list[int],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.silu, ctx.bounds = silu, bounds
        ctx.set_materialize_grads(False)
        W = weight.shape[1]
        dtype = accumulation_dtype(x.dtype)
        taps = weight.detach().t().to(dtype).contiguous()  # (D, W) -> (W, D)
        offset = None if bias is None else bias.detach().to(dtype)
        y = torch.empty_like(x)
        y[bounds[-1] :] = 0
        final = _halos(initial_state, len(bounds) - 1, W - 1, x).clone()
        for block in _blocks(bounds, weight):
            window = _window(x, final, block, W - 1)
            total = _filter(window.to(dtype), taps, offset)
            y[block.start : block.end] = F.silu(total, inplace=True) if silu else total
            if block.last:
                final[block.sequence] = window[len(window) - W + 1 :]
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state = ctx.saved_tensors
        bounds: list[int] = ctx.bounds
        D, W = weight.shape
        dtype = accumulation_dtype(x.dtype)
        taps = weight.t().to(dtype).contiguous()
        offset = None if bias is None else bias.to(dtype)
        halos = _halos(initial_state, len(bounds) - 1, W - 1, x)
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
        dtaps = torch.zeros_like(taps)
        doffset = torch.zeros(D, dtype=dtype, device=x.device)
        dhalos = torch.zeros(halos.shape, dtype=dtype, device=x.device)
        if dfinal is not None:
            # An empty sequence's final state is its initial state.
            empty = [n for n in range(len(halos)) if bounds[n] == bounds[n + 1]]
            dhalos[empty] = dfinal[empty].to(dtype)
        for block in _blocks(bounds, weight):
            n, start, end = block.sequence, block.start, block.end
            window = _window(x, halos, block, W - 1).to(dtype)
            dwindow = torch.zeros_like(window)
            if block.last and dfinal is not None:
                dwindow[len(window) - W + 1 :] = dfinal[n]
            if dy is not None:
                dtotal = dy[start:end].to(dtype)
                if ctx.silu:
                    total = _filter(window, taps, offset)
                    dtotal = torch.ops.aten.silu_backward(dtotal, total)
                for i in range(W):
                    dwindow[i : i + end - start].addcmul_(dtotal, taps[i])
                    dtaps[i] += (window[i : i + end - start] * dtotal).sum(0)
                doffset += dtotal.sum(0)
            if block.first:
                dhalos[n] += dwindow[: W - 1]
                dx[start:end] += dwindow[W - 1 :]
            else:
                dx[start - W + 1 : end] += dwindow
        return (
            dx.to(x.dtype),
            dtaps.t().to(weight.dtype),
            None if bias is None else doffset.to(bias.dtype),
            None if initial_state is None else dhalos.to(initial_state.dtype),
            None,
            None,
        )


def _halos(initial_state: Tensor | None, N: int, reach: int, x: Tensor) -> Tensor:
    """(N, reach, D): the inputs before each sequence, zeros unless given."""
    if initial_state is None:
        return x.new_zeros(N, reach, x.shape[1])
    return initial_state.detach().to(x.dtype)


def _window(x: Tensor, halos: Tensor, block: Block, reach: int) -> Tensor:
    """(L + reach, D): the block's L rows after the `reach` rows before them."""
    if block.first:
        return torch.cat([halos[block.sequence], x[block.start : block.end]])
    return x[block.start - reach : block.end]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, T, D) floating point; got {tuple(x.shape)} {x.dtype}")
    D = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        raise ValueError(
            f"weight must be ({D}, W) beside x {tuple(x.shape)}; got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be ({D},); got {tuple(bias.shape)}")
    if activation not in ("silu", None):
        raise ValueError(f"activation is {activation!r}; it must be 'silu' or None")
    N = check_cu_seqlens(x.shape[0], cu_seqlens)
    halo = (N, weight.shape[1] - 1, D)
    if initial_state is not None and initial_state.shape != halo:
        raise ValueError(
            f"initial_state must be {halo}: the last W − 1 inputs of {N} sequences; "
            f"got {tuple(initial_state.shape)}"
        )
