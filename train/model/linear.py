"""Linear layers whose weights others use: in parts, so that one part's results travel meanwhile, or
stacked, a matrix for each expert.

For a weight (out, in), some rows compute some of the outputs, some columns use some of the inputs.
In the backward pass all parts write into one gradient tensor, each into its own block, so that a
layer in parts writes no more memory than a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Run = tuple[int, int]  # [first, end)


class Linear(nn.Linear):
    """`nn.Linear` that `InParts` can apply in parts.

    Parts go through `forward` too, since ZeRO 3 gathers the weight when it is called.
    """

    def forward(self, x: Tensor, part: Callable[[Tensor, Tensor | None], Any] | None = None) -> Any:
        return F.linear(x, self.weight, self.bias) if part is None else part(self.weight, self.bias)


class Stacked(nn.Module):
    """Matrices (experts, out, in) of which a token meets a few.

    Attributes:
        share: part of the matrices that a token meets, `chosen` of `experts`.
    """

    def __init__(self, experts: int, chosen: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.share = chosen, experts

    def forward(self, x: Tensor, use: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`use(x, weight)`: called with both, since ZeRO 3 gathers the weight for the call, and
        lets go of it when the gradient of x is there."""
        return use(x, self.weight)


def met(module: nn.Module) -> int:
    """Numbers of a module's matrices that a token is multiplied with."""
    found = 0
    for part in module.modules():
        chosen, experts = getattr(part, "share", (1, 1))
        for parameter in part.parameters(recurse=False):
            if parameter.dim() >= 2:
                found += parameter.numel() // experts * chosen
    return found


class InParts:
    """One pass through a `Linear` in `parts` parts, all by rows or all by columns.

    Every part must take part in the backward pass: the last one to do so returns the gradients of
    all.
    """

    def __init__(self, linear: Linear, parts: int) -> None:
        self._linear, self._parts = linear, parts
        self._weight, self._bias, self._x = (_Gradient(parts) for _ in range(3))

    def rows(self, x: Tensor, runs: Sequence[Run]) -> tuple[Tensor, ...]:
        """x (…, in) -> the outputs of each run, (…, end − first). All parts have the same x."""
        if self._parts == 1:
            return self._linear(x).split([end - first for first, end in runs], dim=-1)
        gradients = self._weight, self._bias, self._x
        return self._linear(x, lambda w, b: _Rows.apply(x, w, b, tuple(runs), gradients))

    def columns(self, x: Tensor, run: Run, onto: Tensor | None) -> Tensor:
        """Inputs `run` of the layer -> their part of the outputs, for a layer without bias.

        Args:
            x: (…, end − first), the inputs of the run.
            onto: (…, out), the sum of the parts so far; None for the first.

        Returns:
            (…, out), `onto` with this part added.
        """
        if self._parts == 1:
            return self._linear(x)
        return self._linear(x, lambda w, _: _Columns.apply(x, w, onto, run, self._weight))


class _Gradient:
    """The gradient of one tensor, written by several parts."""

    def __init__(self, parts: int) -> None:
        self._parts = self._missing = parts
        self._sum: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor to write to, of the same shape; empty if `fresh` was true."""
        if self._sum is None:
            self._sum = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return self._sum

    @property
    def fresh(self) -> bool:
        return self._sum is None

    def hand_over(self) -> Tensor | None:
        """The whole gradient for the last part that asks, None for the others before it."""
        self._missing -= 1
        if self._missing:
            return None
        whole, self._sum, self._missing = self._sum, None, self._parts
        return whole


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        runs: tuple[Run, ...],
        gradients: tuple[_Gradient, _Gradient, _Gradient],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, bias)
        ctx.runs, ctx.gradients = runs, gradients
        return tuple(F.linear(x, weight[a:b], None if bias is None else bias[a:b]) for a, b in runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        of_weight, of_bias, of_x = ctx.gradients
        rows = x.reshape(-1, x.shape[-1])  # (…, in) -> (n, in)
        for (a, b), output in zip(ctx.runs, outputs, strict=True):
            dy = output.reshape(-1, b - a)  # (…, b − a) -> (n, b − a)
            if ctx.needs_input_grad[0]:
                first = of_x.fresh
                dx = of_x.of(x).view_as(rows)
                torch.addmm(dx, dy, weight[a:b], beta=0 if first else 1, out=dx)
            if ctx.needs_input_grad[1]:
                torch.mm(dy.T, rows, out=of_weight.of(weight)[a:b])
            if ctx.needs_input_grad[2]:
                torch.sum(dy, 0, out=of_bias.of(bias)[a:b])
        return of_x.hand_over(), of_weight.hand_over(), of_bias.hand_over(), None, None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, onto: Tensor | None, run: Run, of_weight: _Gradient
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.run, ctx.of_weight = run, of_weight
        block = weight[:, slice(*run)]
        if onto is None:
            return F.linear(x, block)
        # (…, out) -> (n, out), (…, inputs) -> (n, inputs)
        y = torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), block.T)
        return y.view_as(onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        block = slice(*ctx.run)
        dx = dy @ weight[:, block] if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            rows = dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])
            torch.mm(*rows, out=ctx.of_weight.of(weight)[:, block])
        return dx, ctx.of_weight.hand_over(), dy if ctx.needs_input_grad[2] else None, None, None
