"""The loss over a large vocabulary, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Backend, device_kind, use_triton
from kernels.packing import accumulation_dtype

# Logits held at a time: on a CPU 2²² (16 MB in fp32), about the size of its last cache; on a GPU
# 2²⁶ (256 MB), since small products do not fill it. With a wide model a GPU holds up to half as
# many logits as the weight has elements: every chunk reads and writes the weight's gradient once.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum over target tokens of the cross-entropy of `hidden @ weight.T`.

        logits_t = W · hidden_t,   lse_t = log Σ_v exp logits_tv,   ce_t = lse_t − logits_t,label
        loss = Σ_t (ce_t + z_loss · lse_t²)

    Args:
        hidden: (T, D), floating point.
        weight: (V, D), the dtype of hidden.
        labels: (T,) int64; −100 marks a token without a target, whose row of hidden is ignored,
            even if it is not finite.
        z_loss: factor on the squared log normaliser (PaLM, arXiv 2204.02311, section 5).
        backend: "triton" (GPU), "torch" (any device), or "auto"; the matrix products are
            torch's either way.

    Returns:
        loss, and Σ ce_t without a gradient, both fp32 scalars (fp64 for fp64 inputs). They are
        sums because only the caller knows how many targets the whole step has. Without any target
        both are 0 and all gradients zeros.

    Gradients are computed in the forward pass, while a chunk's logits exist. In the backward pass
    the logits would have to be computed again: four products of T × V × D instead of three. In
    return the gradients, T × D in the dtype of hidden and V × D in fp32, are held from forward to
    backward. Beside them only one chunk of logits exists at a time (`CHUNK_LOGITS`), whatever
    T × V is. Without grad mode, no gradient is computed.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(hidden, weight, labels)
    loss, cross_entropy = _LinearCrossEntropy.apply(
        hidden, weight, labels, z_loss, torch.is_grad_enabled(), use_triton(backend, hidden)
    )
    return loss, cross_entropy


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy (T,) fp32, and whether its label has the largest logit (T,) bool.

    Tokens with label −100 have 0 and false. No gradient. Arguments and memory as in
    `linear_cross_entropy`.
    """
    _check(hidden, weight, labels)
    losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    likeliest = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    triton = use_triton(backend, hidden)
    for rows, _, logits, targets in _chunks(hidden, _operand(weight), labels, triton):
        likeliest[rows] = logits.argmax(1) == targets
        losses[rows] = _losses(logits, targets, 0.0, False, hidden.dtype, triton)[1].float()
    return losses, likeliest


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        grad_mode: bool,
        triton: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(hidden.dtype)
        for_hidden, for_weight = (grad_mode and need for need in ctx.needs_input_grad[:2])
        dhidden = torch.zeros_like(hidden) if for_hidden else None
        dweight = torch.zeros_like(weight, dtype=dtype) if for_weight else None
        total, total_z = hidden.new_zeros(2, dtype=dtype).unbind()
        projection = _operand(weight)
        for rows, block, logits, targets in _chunks(hidden, projection, labels, triton):
            want = for_hidden or for_weight
            lse, ce, dlogits = _losses(logits, targets, z_loss, want, hidden.dtype, triton)
            total += ce.sum()
            total_z += lse.square().sum()
            if dhidden is not None:
                dhidden[rows] = _product(dlogits, projection).to(hidden.dtype)
            if dweight is not None:
                _add_product(dweight, dlogits.t(), block)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(total)
        return total + z_loss * total_z, total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else (dhidden * dloss).to(dhidden.dtype),
            None if dweight is None else (dweight * dloss).to(ctx.weight_dtype),
            *[None] * 4,
        )


def _chunks(
    hidden: Tensor, projection: Tensor, labels: Tensor, triton: bool
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor, Tensor]]:
    """For each chunk of n tokens: their rows, hidden (n, D), logits (n, V) and labels (n,).

    torch takes the tokens with a target only. Triton takes all, with zeros in place of the others:
    to find out which those are, the CPU would have to wait for the GPU.
    """
    V = max(len(projection), 1)
    limit = CHUNK_LOGITS.get(device_kind(hidden), CHUNK_LOGITS["cpu"])
    if device_kind(hidden) == "cuda":
        limit = max(limit, projection.numel() // 2)
    step = max(limit // V, 1)
    if triton:
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            block = hidden[rows].masked_fill((labels[rows] == IGNORED).unsqueeze(1), 0)
            yield rows, block, _product(block, projection.t()), labels[rows]
    else:
        targets = (labels != IGNORED).nonzero().squeeze(1)
        for chosen in targets.split(step) if len(targets) else ():
            block = hidden[chosen]
            yield chosen, block, _product(block, projection.t()), labels[chosen]


def _losses(
    logits: Tensor, labels: Tensor, z_loss: float, gradient: bool, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lse and ce (n,) of logits (n, V), and if `gradient` the gradient of Σ ce + z_loss · lse²,

        softmax · (1 + 2 · z_loss · lse) − onehot(label),

    (n, V), which overwrites the logits if it has their dtype.
    """
    if triton:
        from kernels.triton import cross_entropy as compiled

        return compiled.losses(logits, labels, z_loss, gradient, dtype)
    chosen = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    if not gradient:
        lse = logits.logsumexp(1)
        return lse, lse - chosen, logits
    top = logits.amax(1, keepdim=True)
    mass = logits.sub_(top).exp_().sum(1, keepdim=True)
    lse = (top + mass.log()).squeeze(1)
    logits.mul_((1 + 2 * z_loss * lse).unsqueeze(1) / mass)
    logits[torch.arange(len(labels), device=labels.device), labels] -= 1
    return lse, lse - chosen, logits


def _operand(x: Tensor) -> Tensor:
    """x in the dtype to multiply: its own on a GPU, whose tensor cores sum in fp32; fp32 (fp64) on
    a CPU, where sums of a bf16 product are rounded to bf16."""
    return x if device_kind(x) == "cuda" else x.to(accumulation_dtype(x.dtype))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in fp32 (fp64 for fp64)."""
    left, right = _operand(left), _operand(right)
    if left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right.to(left.dtype), out_dtype=torch.float32)
    return left @ right.to(left.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place."""
    left, right = _operand(left), _operand(right)
    if left.dtype == total.dtype:
        total.addmm_(left, right.to(total.dtype))
    else:
        torch.addmm(total, left, right.to(left.dtype), out_dtype=total.dtype, out=total)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Check shapes and dtypes; values of labels too if these are on the CPU."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (T, D) and weight (V, D); "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden and weight must share one floating dtype; got {hidden.dtype}, {weight.dtype}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be ({len(hidden)},) int64; got {tuple(labels.shape)} {labels.dtype}"
        )
    if labels.device.type == "cpu" and len(labels):
        V = len(weight)
        wrong = (labels >= V) | ((labels < 0) & (labels != IGNORED))
        if wrong.any():
            raise ValueError(
                f"labels must be {IGNORED} or from 0 to {V - 1}; got {int(labels[wrong][0])}"
            )
