"""The recurrence with an element-wise state.

    h_t = a_t · h_{t−1} + x_t,   a_t = exp(decay_t)

A pair (a, x) is an affine map of the state, and maps compose as
(a₂, x₂) ∘ (a₁, x₁) = (a₂a₁, a₂x₁ + x₂): a prefix scan. Factors are at most 1, and nothing is
divided by their products. At a sequence's first row a is set to 0 and the initial state is added to
x, so one scan over the stream serves all sequences. Three kernels:

    totals   the map of each chunk of up to ROWS rows            reads x and decay
    enter    a scan over the chunks' maps: the state after each  reads and writes 1 / ROWS as much
    scan     each chunk again, from the state that enters it     reads x and decay, writes h

In the first and the last all chunks run in parallel, so one long sequence fills a GPU; in return x
and decay are read twice. The backward pass is the same scan from the other end,

    g_t = dh_t + a_{t+1} · g_{t+1},   dx_t = g_t,   ddecay_t = a_t · h_{t−1} · g_t,

and keeps decay and h.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` over a constant must stand alone to be decided at compile time)
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import DTYPES, Launch, architecture, launch, recording
from kernels.triton.sequences import chunk_of, load_rows, packed_bounds, programs, store_rows


class Tile(NamedTuple):
    ROWS: int  # of a chunk
    CHANNELS: int  # of a program: few, so that there are many programs; 64-byte lines suffice
    CHUNKS: int  # that `enter` takes at a time
    num_warps: int


def tile(arch: str) -> Tile:
    # A small tile for the interpreter, which calls `compose` for each element.
    return Tile(16, 2, 16, 1) if arch == "interpreter" else Tile(64, 32, 64, 4)


GENERIC = ["N", "length", "chunks"]  # arguments whose values must not cause another compilation


@triton.jit
def compose(a1, x1, a2, x2):
    """The map (a1, x1) followed by (a2, x2)."""
    return a2 * a1, a2 * x1 + x2


@triton.jit
def forward_maps(
    x, decay, state, n, start, end, first, c, D, STATE: tl.constexpr, ROWS: tl.constexpr
):
    """(a, x), (ROWS, CHANNELS) each, of a chunk's rows; past its end the identity (1, 0)."""
    # Missing rows are loaded as zero: a decay of 0 is a factor of 1.
    a = tl.exp(load_rows(decay, first, 0, start, end, c, D, ROWS))
    maps = load_rows(x, first, 0, start, end, c, D, ROWS)
    if (first == start) & (first < end):
        opening = (tl.arange(0, ROWS) == 0)[:, None]
        if STATE:
            entering = tl.load(state + n * D + c, mask=c < D, other=0.0)
            maps += tl.where(opening, a * entering[None, :], 0.0)
        a = tl.where(opening, 0.0, a)
    return a, maps


@triton.jit
def backward_maps(
    dh, dfinal, decay, n, start, end, first, c, D,
    OUTPUT: tl.constexpr, FINAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(a_{t+1}, dh_t), (ROWS, CHANNELS) each; a_{t+1} is 0 at a sequence's last row."""
    a = tl.exp(load_rows(decay, first, 1, start, end, c, D, ROWS))
    maps = tl.zeros([ROWS, c.shape[0]], tl.float32)
    if OUTPUT:
        maps += load_rows(dh, first, 0, start, end, c, D, ROWS)
    closing = (tl.arange(0, ROWS) == (end - 1 - first).to(tl.int32))[:, None]
    a = tl.where(closing, 0.0, a)
    if FINAL:
        if first < end:
            leaving = tl.load(dfinal + n * D + c, mask=c < D, other=0.0)
            maps += tl.where(closing, leaving[None, :], 0.0)
    return a, maps


@triton.jit
def scanned(a, maps, REVERSE: tl.constexpr):
    return tl.associative_scan((a, maps), 0, compose, reverse=REVERSE)


@triton.jit
def row_of(tile, row, ROWS: tl.constexpr):
    chosen = tl.arange(0, ROWS) == row
    return tl.sum(tl.where(chosen[:, None], tile, 0.0), 0)


@triton.jit
def store_total(a, maps, factors, totals, chunk, c, D, REVERSE: tl.constexpr, ROWS: tl.constexpr):
    a, maps = scanned(a, maps, REVERSE)
    last = 0 if REVERSE else ROWS - 1
    tl.store(factors + chunk * D + c, row_of(a, last, ROWS), mask=c < D)
    tl.store(totals + chunk * D + c, row_of(maps, last, ROWS), mask=c < D)


@triton.jit
def state_entering(states, chunk, chunks, c, D, REVERSE: tl.constexpr):
    """(CHANNELS,): the state after the chunk before, or if REVERSE the chunk after; else zero."""
    neighbour = tl.zeros_like(c) + chunk + (1 if REVERSE else -1)
    known = (neighbour >= 0) & (neighbour < chunks)
    return tl.load(states + neighbour * D + c, mask=known & (c < D), other=0.0)


@triton.jit(do_not_specialize=GENERIC)
def forward_totals(
    x, decay, state, factors, totals, bounds, N, length, D,
    STATE: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, start, end, first = chunk_of(chunk, bounds, N, length, ROWS, PACKED)
    end = tl.where(n < N, end, first)
    a, maps = forward_maps(x, decay, state, n, start, end, first, c, D, STATE, ROWS)
    store_total(a, maps, factors, totals, chunk, c, D, False, ROWS)


@triton.jit(do_not_specialize=GENERIC)
def backward_totals(
    dh, dfinal, decay, factors, totals, bounds, N, length, D,
    OUTPUT: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, start, end, first = chunk_of(chunk, bounds, N, length, ROWS, PACKED)
    end = tl.where(n < N, end, first)
    a, maps = backward_maps(dh, dfinal, decay, n, start, end, first, c, D, OUTPUT, FINAL, ROWS)
    store_total(a, maps, factors, totals, chunk, c, D, True, ROWS)


@triton.jit(do_not_specialize=GENERIC)
def enter(
    factors, totals, chunks, D,
    REVERSE: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Turn `totals` (chunks, D), the chunks' maps, into the states after each chunk, in place."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.zeros([CHANNELS], tl.float32)
    for taken in range(0, chunks, CHUNKS):
        chunk = taken + tl.arange(0, CHUNKS).to(tl.int64)
        if REVERSE:
            chunk = chunks - 1 - chunk
        place = chunk[:, None] * D + c[None, :]
        mask = ((chunk >= 0) & (chunk < chunks))[:, None] & (c < D)[None, :]
        a = tl.load(factors + place, mask=mask, other=0.0)
        maps = tl.load(totals + place, mask=mask, other=0.0)
        a, maps = scanned(a, maps, False)
        states = maps + a * state[None, :]
        tl.store(totals + place, states, mask=mask)
        state = row_of(states, CHUNKS - 1, CHUNKS)


@triton.jit(do_not_specialize=GENERIC)
def forward_scan(
    x, decay, state, states, h, final, bounds, N, length, D, chunks,
    STATE: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, start, end, first = chunk_of(chunk, bounds, N, length, ROWS, PACKED)
    out = tl.zeros([ROWS, CHANNELS], tl.float32)
    if n < N:
        a, maps = forward_maps(x, decay, state, n, start, end, first, c, D, STATE, ROWS)
        a, maps = scanned(a, maps, False)
        out = maps + a * state_entering(states, chunk, chunks, c, D, False)[None, :]
        if (first < end) & (first + ROWS >= end):
            last = row_of(out, (end - 1 - first).to(tl.int32), ROWS)
            tl.store(final + n * D + c, last, mask=c < D)
    store_rows(h, out, first, start, end, c, D, ROWS)


@triton.jit(do_not_specialize=GENERIC)
def backward_scan(
    dh, dfinal, decay, state, h, states, dx, ddecay, dstate, bounds, N, length, D, chunks,
    OUTPUT: tl.constexpr, FINAL: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, start, end, first = chunk_of(chunk, bounds, N, length, ROWS, PACKED)
    g = tl.zeros([ROWS, CHANNELS], tl.float32)
    to_decay = g
    if n < N:
        a, maps = backward_maps(dh, dfinal, decay, n, start, end, first, c, D, OUTPUT, FINAL, ROWS)
        a, maps = scanned(a, maps, True)
        g = maps + a * state_entering(states, chunk, chunks, c, D, True)[None, :]
        to_decay = g * tl.exp(load_rows(decay, first, 0, start, end, c, D, ROWS))
        before = load_rows(h, first, -1, start, end, c, D, ROWS)
        if STATE:
            if (first == start) & (first < end):
                entering = tl.load(state + n * D + c, mask=c < D, other=0.0)
                before += tl.where((tl.arange(0, ROWS) == 0)[:, None], entering[None, :], 0.0)
                tl.store(dstate + n * D + c, row_of(to_decay, 0, ROWS), mask=c < D)
        to_decay *= before
    store_rows(dx, g, first, start, end, c, D, ROWS)
    store_rows(ddecay, to_decay, first, start, end, c, D, ROWS)


def forward(
    x: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h and the final state of `kernels.diagonal_scan`; bf16, fp16 or fp32."""
    T, D = x.shape[1:]
    bounds = packed_bounds(cu_seqlens, x.device)
    N = _sequences(x, bounds)
    x, decay = x.contiguous(), decay.contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    h = torch.empty_like(x)
    # An empty sequence's final state is its initial state.
    final = x.new_zeros(N, D, dtype=torch.float32) if state is None else state.clone()
    factors, totals, grid, constants = _plan(x, bounds)
    constants["STATE"] = state is not None
    chunks = grid[0]
    launch(forward_totals, grid, x, decay, state, factors, totals, bounds, N, T, D, **constants)
    _enter(factors, totals, False)
    launch(
        forward_scan, grid, x, decay, state, totals, h, final, bounds, N, T, D, chunks,
        **constants,
    )  # fmt: skip
    return h, final


def backward(
    h: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dh: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the decay and of the initial state, if there is one, in fp32."""
    T, D = h.shape[1:]
    bounds = packed_bounds(cu_seqlens, h.device)
    N = _sequences(h, bounds)
    h, decay = h.contiguous(), decay.contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    dh = None if dh is None else dh.contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    dx, ddecay = torch.empty_like(h), torch.empty_like(decay)
    dstate = None
    if state is not None:
        dstate = torch.zeros_like(state) if dfinal is None else dfinal.clone()
    factors, totals, grid, constants = _plan(h, bounds)
    constants |= {"OUTPUT": dh is not None, "FINAL": dfinal is not None}
    chunks = grid[0]
    launch(backward_totals, grid, dh, dfinal, decay, factors, totals, bounds, N, T, D, **constants)
    _enter(factors, totals, True)
    launch(
        backward_scan, grid, dh, dfinal, decay, state, h, totals, dx, ddecay, dstate, bounds,
        N, T, D, chunks, STATE=state is not None, **constants,
    )  # fmt: skip
    return dx, ddecay, dstate


def ends(x: Tensor, decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(N, D) fp32: the last h of each sequence, from states of zero."""
    x, decay, bounds = x.contiguous(), decay.contiguous(), packed_bounds(cu_seqlens, x.device)
    (T, D), N = x.shape[1:], _sequences(x, bounds)
    factors, totals, grid, constants = _plan(x, bounds)
    launch(
        forward_totals, grid, x, decay, None, factors, totals, bounds, N, T, D,
        STATE=False, **constants,
    )  # fmt: skip
    _enter(factors, totals, False)
    return totals[_first_chunks(N, T, bounds, constants["ROWS"], x.device)[1:] - 1]


def starts(dh: Tensor, decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(N, D) fp32: the gradient of each sequence's initial state that comes through h alone."""
    dh, decay, bounds = dh.contiguous(), decay.contiguous(), packed_bounds(cu_seqlens, dh.device)
    (B, T, D), N = dh.shape, _sequences(dh, bounds)
    factors, totals, grid, constants = _plan(dh, bounds)
    launch(
        backward_totals, grid, dh, None, decay, factors, totals, bounds, N, T, D,
        OUTPUT=True, FINAL=False, **constants,
    )  # fmt: skip
    _enter(factors, totals, True)
    first = torch.arange(N, device=dh.device) * T if bounds is None else bounds[:-1]
    chunk = _first_chunks(N, T, bounds, constants["ROWS"], dh.device)[:-1]
    return totals[chunk] * decay.view(B * T, D)[first].float().exp()


def _sequences(x: Tensor, bounds: Tensor | None) -> int:
    return len(x) if bounds is None else len(bounds) - 1


def _first_chunks(
    N: int, length: int, bounds: Tensor | None, rows: int, device: torch.device
) -> Tensor:
    """(N + 1,): the chunk that each sequence begins with, and that after the last one's."""
    number = torch.arange(N + 1, device=device)
    return number * -(-length // rows) if bounds is None else bounds // rows + number


def _plan(
    x: Tensor, bounds: Tensor | None
) -> tuple[Tensor, Tensor, tuple[int, int], dict[str, Any]]:
    """Empty factors and totals (chunks, D); the grid (chunks, channel blocks); the constants."""
    B, T, D = x.shape
    chosen = tile(architecture(x.device))
    chunks = programs(B, T, bounds, chosen.ROWS)
    factors, totals = x.new_empty(2, chunks, D, dtype=torch.float32).unbind()
    constants = {
        "PACKED": bounds is not None, "ROWS": chosen.ROWS, "CHANNELS": chosen.CHANNELS,
        "num_warps": chosen.num_warps, "num_stages": 1,
    }  # fmt: skip
    return factors, totals, (chunks, -(-D // chosen.CHANNELS)), constants


def _enter(factors: Tensor, totals: Tensor, reverse: bool) -> None:
    chunks, D = totals.shape
    chosen = tile(architecture(totals.device))
    launch(
        enter, (-(-D // chosen.CHANNELS),), factors, totals, chunks, D,
        REVERSE=reverse, CHUNKS=chosen.CHUNKS, CHANNELS=chosen.CHANNELS,
        num_warps=chosen.num_warps, num_stages=1,
    )  # fmt: skip


def shipped(arch: str) -> Iterator[tuple[str, Launch]]:
    """Every launch of a forward and backward pass, with its name."""
    for dtype in DTYPES:
        for packed in (True, False):
            x, decay = torch.empty(2, 1, 8192, 2048, device="meta").unbind()
            state = torch.empty(8 if packed else 1, 2048, device="meta")
            cu_seqlens = torch.empty(9, dtype=torch.int64, device="meta") if packed else None
            with recording(arch) as launches:
                h, final = forward(x.to(dtype), decay, state, cu_seqlens)
                backward(h, decay, state, cu_seqlens, h, final)
            name = f"diagonal scan {'packed ' * packed}{str(dtype).removeprefix('torch.')}"
            for launched in launches:
                yield f"{name} {launched.kernel.__name__}", launched
