"""Bytes that the parts of a model need at work, counted by running each once on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.backend import imagining
from parallel import Shard
from train.experts import Stack, settle
from train.forecast.ledger import Ledger
from train.forecast.travelling import ImaginedRows
from train.model.config import ModelConfig
from train.model.initial import without_values
from train.model.mlps import experts
from train.model.mlps._balance import Counted
from train.model.mlps._router import Router
from train.model.norm import RMSNorm
from train.model.transformer import Block, Head

Device = Literal["cpu", "cuda"]
EMBEDDING, LOSS = "embedding", "loss"


@dataclass(frozen=True)
class Part:
    """What one part of the model needs at work, in bytes.

    Attributes:
        name: "embedding", "loss" (with the last norm), or what `block_kinds` calls a block.
        forward: most at a time above what there was before its forward pass.
        kept: left for its backward pass, without its output.
        output: its output.
        backward: most at a time in its backward pass, above what there is at its start: its
            input and what it kept. The gradient of its output is counted here.
        moving: as `backward`, if the gradient of each parameter is moved away once it is there.
        gradients: of its parameters, left by its backward pass.
        at_home: of its experts that live at home, likewise, in fp32; these are no parameters.
    """

    name: str
    forward: float
    kept: float
    output: float
    backward: float
    moving: float
    gradients: float
    at_home: float = 0.0

    def towards(self, other: Part, way: float) -> Part:
        """The part at a point of the line from this one (0) to `other` (1)."""
        mine, others = vars(self), vars(other)
        numbers = {key: mine[key] + way * (others[key] - mine[key]) for key in list(mine)[1:]}
        return Part(self.name, **numbers)


@dataclass(frozen=True)
class Shape:
    """What the bytes of a part depend on, beside its settings and its tokens.

    Attributes:
        device: whose code runs.
        dtype: of weights and activations.
        vocab_size: pieces.
        checkpointed: whether blocks keep their input only.
        rows: how rows travel to experts, by the name of the blocks in which they do.
    """

    device: Device
    dtype: torch.dtype
    vocab_size: int
    checkpointed: bool
    rows: Mapping[str, ImaginedRows] = field(default_factory=dict)


def parts(model: ModelConfig, shape: Shape, shard: Shard) -> dict[str, Part]:
    """Every kind of part of a model by its name, at work on a shard."""
    total = shard.tokens
    with without_values():
        embedding = nn.Embedding(shape.vocab_size, model.dim)
        tail = _Tail(model, shape.vocab_size)
        kinds = model.block_kinds
        blocks = {name: Block(model, kinds.index(name)) for name in set(kinds)}
        tokens = torch.empty(total, dtype=torch.int64)
    labels = tokens.clone()
    counted = Counted(labels, shard)
    made = {
        EMBEDDING: _measured(EMBEDDING, embedding, None, lambda: embedding(tokens), shape),
        LOSS: _measured(LOSS, tail, total, partial(tail, labels=labels), shape, model.dim),
    }
    for name, block in blocks.items():
        run: Callable[..., Tensor] = partial(block, shard=shard)
        if shape.checkpointed:
            run = partial(checkpoint, block, shard=shard, use_reentrant=False)
        at_home: dict[str, Stack] = {}
        if name in shape.rows:
            assert isinstance(block.mlp, experts.MLP)
            at_home = settle(block.mlp, shape.rows[name], shape.dtype, torch.device("meta"))
        routers = [part for part in block.modules() if isinstance(part, Router)]
        for router in routers:
            router.batch = counted
        made[name] = _measured(
            name, block, total, run, shape, model.dim, [*at_home.values()], routers
        )
    return made


class _Tail(nn.Module):
    """The end of the model: (1, t, dim) and labels (t,) -> the loss."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps, config.zero_centered_norms)
        self.head = Head(vocab_size, config.dim, config.z_loss)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss, _ = self.head(self.norm(x).squeeze(0), labels)
        return loss


def _measured(
    name: str,
    module: nn.Module,
    total: int | None,
    run: Callable[..., Tensor],
    shape: Shape,
    dim: int = 0,
    at_home: Sequence[Stack] = (),
    routers: Sequence[Router] = (),
) -> Part:
    """Run a part forward and backward, its input (1, total, dim), or none if `total` is None.

    What routers count for the losses of balance has its gradient from the end of the model too.
    """
    module.to(shape.dtype)
    with _counting(shape.device) as ledger:
        inputs = []
        if total is not None:
            leaf = torch.empty(1, total, dim, dtype=shape.dtype, device="meta", requires_grad=True)
            inputs.append(_Begin.apply(leaf))
            del leaf
        before = ledger.live
        ledger.reset_peak()
        y = run(*inputs)
        del inputs
        forward, output = ledger.peak - before, y.numel() * y.element_size()
        tallies = [router.tally for router in routers if router.tally is not None]
        losses = [loss for tally in tallies for loss in tally.losses]
        end = _End.apply(y, *losses)
        for router in routers:
            router.tally = None
        del y, tallies, losses
        start = ledger.live
        # Nothing else may hold the output: the next part has let go of it by now.
        ledger.reset_peak()

        def moved(parameter: Tensor) -> None:
            assert parameter.grad is not None
            ledger.aside += parameter.grad.numel() * parameter.grad.element_size()

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(moved)

        def settled(stack: Stack, _: Tensor) -> None:
            assert stack.gradient is not None
            ledger.aside += stack.gradient.nbytes

        for stack in at_home:
            stack.weight.register_post_accumulate_grad_hook(partial(settled, stack))
        end.backward()
        del end
        backward, moving = ledger.peak - start, ledger.peak_beside - start
        home = sum(stack.gradient.nbytes for stack in at_home if stack.gradient is not None)
        gradients = ledger.aside - home
        return Part(name, forward, start - before, output, backward, moving, gradients, home)


@contextmanager
def _counting(device: Device) -> Iterator[Ledger]:
    with ExitStack() as stack:
        stack.enter_context(imagining(device))
        if device == "cuda":
            from kernels.triton.launch import launching_nothing

            stack.enter_context(launching_nothing("sm_90"))
        yield stack.enter_context(Ledger())


class _Begin(torch.autograd.Function):
    """x as it comes from the part before, whose gradient nobody keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> None:
        return None


class _End(torch.autograd.Function):
    """The parts that follow: they take y, and make its gradient in the backward pass; and that of
    other results, which are small."""

    @staticmethod
    def forward(ctx: Any, *results: Tensor) -> Tensor:
        ctx.like = [(y.shape, y.dtype, y.device) for y in results]
        return results[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like
        )
