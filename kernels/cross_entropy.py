"""The loss over a large vocabulary, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.packing import accumulation_dtype

# Logits held at a time: 2²² in fp32 are 16 MB, near a CPU's last cache; a GPU wants larger
# products to fill it (256 MB).
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum over target tokens of the cross-entropy of `hidden @ weight.T`.

        logits_t = W · hidden_t,   lse_t = log Σ_v exp logits_tv,   ce_t = lse_t − logits_t,label
        loss = Σ_t (ce_t + z_loss · lse_t²)

    Args:
        hidden: (T, D), floating point.
        weight: (V, D), the dtype of hidden.
        labels: (T,) int64; −100 marks a token without a target. Its row of hidden is never
            looked at, whatever it holds.
        z_loss: factor on the squared log normaliser (PaLM, arXiv 2204.02311, section 5).

    Returns:
        loss, and Σ ce_t without a gradient, both fp32 scalars (fp64 for fp64 inputs). Sums,
        not means: the caller knows how many targets the whole step has. Without any target
        both are 0 and all gradients zeros.

    The gradients are made in the forward, while a chunk's logits are there: the backward
    would have to make the logits again, one of four products of T × V × D. The price is
    that the gradients (T × D in the dtype of hidden, V × D in fp32) are held between
    forward and backward; beside them only a chunk of logits, 16 MB on a CPU, 256 MB on a
    GPU, whatever T × V is. Without grad mode, no gradient is computed.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(hidden, weight, labels)
    loss, cross_entropy = _LinearCrossEntropy.apply(
        hidden, weight, labels, z_loss, torch.is_grad_enabled()
    )
    return loss, cross_entropy


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token: (T,) fp32, 0 where the label is −100; no gradient.

    Arguments and memory as in `linear_cross_entropy`.
    """
    _check(hidden, weight, labels)
    losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    targets = _targets(labels)
    projection = _projection(weight)
    for rows in _chunks(targets, weight):
        logits = _logits(hidden[rows], projection)
        losses[rows] = (_log_normaliser(logits) - _at(logits, labels[rows])).float()
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, grad_mode: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(hidden.dtype)
        want_hidden, want_weight = (grad_mode and need for need in ctx.needs_input_grad[:2])
        dhidden = torch.zeros_like(hidden) if want_hidden else None
        dweight = (
            torch.zeros(weight.shape, dtype=dtype, device=weight.device) if want_weight else None
        )
        total, total_z = hidden.new_zeros(2, dtype=dtype).unbind()
        projection = _projection(weight)
        for rows in _chunks(_targets(labels), weight):
            block, targets = hidden[rows], labels[rows]
            logits = _logits(block, projection)
            chosen = _at(logits, targets)
            if want_hidden or want_weight:
                # The logits turn into their own gradient where they lie:
                # softmax · (1 + 2 · z_loss · lse) − onehot(label).
                top = logits.amax(1, keepdim=True)
                mass = logits.sub_(top).exp_().sum(1, keepdim=True)
                lse = (top + mass.log()).squeeze(1)
                logits.mul_((1 + 2 * z_loss * lse).unsqueeze(1) / mass)
                logits[torch.arange(len(targets), device=targets.device), targets] -= 1
                if dhidden is not None:
                    dhidden[rows] = _product(logits, projection).to(hidden.dtype)
                if dweight is not None:
                    _add_product(dweight, logits.t(), block)
            else:
                lse = _log_normaliser(logits)
            total += (lse - chosen).sum()
            total_z += lse.square().sum()
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(total)
        return total + z_loss * total_z, total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * dloss.to(dhidden.dtype),
            None if dweight is None else (dweight * dloss).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _targets(labels: Tensor) -> Tensor:
    """The rows that have a target. Only these are computed, so the others may hold NaN."""
    return (labels != IGNORED).nonzero().squeeze(1)


def _chunks(targets: Tensor, weight: Tensor) -> Iterator[Tensor]:
    limit = CHUNK_LOGITS.get(weight.device.type, CHUNK_LOGITS["cpu"])
    rows = max(limit // max(len(weight), 1), 1)
    return iter(targets.split(rows)) if len(targets) else iter(())


def _projection(weight: Tensor) -> Tensor:
    """The weight as the products want it: fp32 on a CPU, whose bf16 products round their
    sums; as it is on a GPU, whose tensor cores sum in fp32."""
    return weight if weight.is_cuda else weight.to(accumulation_dtype(weight.dtype))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with sums and result in fp32 (fp64 for fp64), in the dtype of `right`."""
    if right.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    return left.to(right.dtype) @ right


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place where the dtypes allow."""
    if right.is_cuda and right.dtype != total.dtype:
        total += _product(left, right)
    else:
        total.addmm_(left, right.to(total.dtype))


def _logits(block: Tensor, projection: Tensor) -> Tensor:
    return _product(block, projection.t())


def _log_normaliser(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=1)


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Shapes and dtypes; label values too where no device must be waited for."""
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
    if not labels.is_cuda and len(labels):
        V = len(weight)
        wrong = (labels >= V) | ((labels < 0) & (labels != IGNORED))
        if wrong.any():
            raise ValueError(
                f"labels must be {IGNORED} or from 0 to {V - 1}; got {int(labels[wrong][0])}"
            )
