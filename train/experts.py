"""Experts that live on some ranks: each rank has the matrices of its own, and rows travel to them.

`parallel.experts: rows`. DeepSpeed never sees these matrices, so they are kept alike at every stage
of ZeRO: no rank gathers or reduces them. All rows of an expert meet at its homes, where its whole
gradient is then. An expert with several homes, replicas, has its gradient, master weights and means
shared out over these. What leaves for a checkpoint are full tensors by name, as of any parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from parallel import World
from parallel.travel import exchange
from parallel.travel.homes import Homes
from parallel.travel.rows import Rows
from train.model.linear import Stacked
from train.model.mlps.experts import MLP
from train.model.transformer import Model
from train.optimiser.muon import Piece, muon
from train.optimiser.optim import OptimConfig, parameter_groups
from train.optimiser.state import MUON, WEIGHT, Read, create, keys_of, read_into

GRADIENT = "gradient"  # beside what is saved: of a step, once `AtHome.reduce` has summed it


@dataclass(eq=False)
class Stack:
    """The matrices (experts, out, in) of a layer, of which this rank has some.

    Attributes:
        shape: of all of them.
        weight: (experts here, out, in), what the model computes with.
        master: this rank's part of it in fp32, which the optimiser steps: all of it, in its shape,
            or flat a part, if there are replicas. In fp32 training it shares its memory.
        keys: what is saved of it.
        gradient: of `weight`, in fp32, summed over batches; None before the first one.
    """

    shape: torch.Size
    homes: Homes
    weight: Tensor
    master: Tensor
    keys: tuple[str, ...] = ()
    gradient: Tensor | None = None

    def held(self, rank: int) -> tuple[int, int]:
        """What a rank has of all numbers, flattened, as [first, end)."""
        first, end = self.homes.run(rank)
        size = self.shape[1:].numel()
        return first * size, end * size

    def parts(self, rank: int) -> dict[int, tuple[int, int]]:
        """What the replicas of a rank, itself among them, step of what they have."""
        first, end = self.held(rank)
        every = self.homes.replicas(rank)
        bounds = [first + (end - first) * i // len(every) for i in range(len(every) + 1)]
        return dict(zip(every, pairwise(bounds), strict=True))

    def slices(self, of: Tensor, rank: int) -> dict[int, Tensor]:
        """Those parts of what is held, flat, by replica."""
        first, _ = self.held(rank)
        return {
            peer: of.view(-1)[a - first : b - first] for peer, (a, b) in self.parts(rank).items()
        }


def layers_of(model: nn.Module) -> dict[str, MLP]:
    """The MLPs of experts of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MLP)}


class AtHome:
    """The experts' matrices of a model, taken out of it and given to their homes.

    Args:
        model: on `meta` or with weights that are not kept.
        layers: names of the MLPs to whose experts rows travel; their matrices are no parameters of
            the model any more. On one rank none are taken out. Of each, whether they travel
            instead for a batch of which that is fewer bytes.
    """

    def __init__(
        self,
        model: Model,
        optim: OptimConfig,
        world: World,
        dtype: torch.dtype,
        layers: Mapping[str, bool],
    ) -> None:
        self.world = world
        self.stacks: dict[str, Stack] = {}
        for name, layer in layers_of(model).items():
            if name in layers and world.size > 1:
                self._settle(name, layer, dtype, layers[name])
        of_weight = {nn.Parameter(stack.weight): name for name, stack in self.stacks.items()}
        named = [(name, parameter) for parameter, name in of_weight.items()]
        groups = parameter_groups(named, optim, model.lr_multipliers())
        for group in groups:
            stacks = [self.stacks[of_weight[parameter]] for parameter in group["params"]]
            group["params"] = [stack.master for stack in stacks]
            for stack in stacks:
                stack.keys = keys_of(group)
        none: dict[str, Any] = {"params": [], "orthogonal": False, "multiplier": 1.0}
        self._optimizer = muon(groups or [none], optim, world)
        for group in groups:
            for master in group["params"]:
                create(self._optimizer.state, master, group)
        for stack in self.stacks.values():
            if stack.homes.replicated and stack.keys == MUON:
                self._optimizer.pieces[stack.master] = _pieces(stack, world)

    @property
    def numbers(self) -> int:
        """Of all matrices that were taken out, on all ranks together."""
        return sum(stack.shape.numel() for stack in self.stacks.values())

    def reduce(self) -> float:
        """Sum the gradients of a step over replicas; the square of their norm over all ranks."""
        world = self.world
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[Tensor]] = {}
        sums = []
        for stack in self.stacks.values():
            if stack.gradient is None:
                stack.gradient = torch.zeros_like(stack.weight, dtype=torch.float32)
            slices = stack.slices(stack.gradient.div_(world.size), world.rank)
            mine = slices[world.rank]
            terms = {peer: torch.empty_like(mine) for peer in slices if peer != world.rank}
            for peer, term in terms.items():
                sends.setdefault(peer, []).append(slices[peer])
                receives.setdefault(peer, []).append(term)
            sums.append((stack, {**terms, world.rank: mine}))
        exchange.post(sends, receives, world.group)()
        square = torch.zeros((), dtype=torch.float64, device=world.device)
        for stack, terms in sums:
            first, *others = (terms[peer] for peer in sorted(terms))
            total = torch.stack([first, *others]).sum(0) if others else first
            stack.master.grad = total.view(stack.master.shape)
            stack.gradient = None
            square += torch.linalg.vector_norm(total, dtype=torch.float64).square()
        return float(world.sum(square)) if self.stacks else 0.0

    def step(self, learning_rate: float, factor: float) -> None:
        """Step the weights of experts by what `reduce` summed, times `factor`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["multiplier"]
            for master in group["params"]:
                master.grad.mul_(factor)
        self._optimizer.step()
        self._share()
        self.forget()

    def forget(self) -> None:
        """Let go of all gradients."""
        for stack in self.stacks.values():
            stack.gradient = stack.master.grad = None

    def full(self, name: str, key: str) -> Tensor:
        """The full fp32 tensor of a stack, on all ranks together."""
        stack = self.stacks[name]
        part = self._part(stack, key)
        parts = [stack.parts(rank)[rank] for rank in range(self.world.size)]
        most = max(end - first for first, end in parts)
        padded = part.new_zeros(most)
        padded[: part.numel()] = part.reshape(-1)
        whole = part.new_empty(stack.shape)
        for (first, end), theirs in zip(parts, self.world.all_gather(padded), strict=True):
            whole.view(-1)[first:end] = theirs[: end - first]
        return whole

    def scatter(self, read: Read, keys: Collection[str]) -> None:
        """Set what `keys` name; each rank reads what it has."""
        rank = self.world.rank
        for name, stack in self.stacks.items():
            for key in stack.keys:
                if key in keys:
                    part = self._part(stack, key).view(-1)
                    begin, _ = stack.parts(rank)[rank]
                    read_into(part, begin, lambda *at, n=name, k=key: read(n, k, *at))
        if WEIGHT in keys:
            self._share()

    def set_step(self, step: int) -> None:
        """The optimiser's count of steps."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _settle(self, path: str, layer: MLP, dtype: torch.dtype, either: bool) -> None:
        """Give a layer's matrices to their homes."""
        world = self.world
        homes = Homes(layer.up.weight.shape[0], world.topology)
        rows = Rows(homes, world.rank, world.group, world.device, either)
        for name, stack in settle(layer, rows, dtype, world.device).items():
            whole = stack.weight.detach()
            mine = stack.slices(whole, world.rank)[world.rank] if homes.replicated else whole
            stack.master = mine.float()
            self.stacks[f"{path}.{name}.weight"] = stack

    def _part(self, stack: Stack, key: str) -> Tensor:
        """This rank's part of an fp32 tensor."""
        if key == WEIGHT:
            return stack.master
        if key == GRADIENT:
            assert stack.master.grad is not None
            return stack.master.grad
        part: Tensor = self._optimizer.state[stack.master][key]
        return part

    @torch.no_grad()
    def _share(self) -> None:
        """Set the weights that the model computes with, from those of all replicas."""
        rank = self.world.rank
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[Tensor]] = {}
        for stack in self.stacks.values():
            slices = stack.slices(stack.weight.detach(), rank)
            mine = slices.pop(rank)
            mine.copy_(stack.master.view(-1))  # in fp32 it is the same memory
            for peer, theirs in slices.items():
                sends.setdefault(peer, []).append(mine)
                receives.setdefault(peer, []).append(theirs)
        exchange.post(sends, receives, self.world.group)()


def settle(layer: MLP, rows: Rows, dtype: torch.dtype, device: torch.device) -> dict[str, Stack]:
    """Let rows travel to a layer's experts: its matrices are no parameters any more, but those of
    the rank of `rows`, unset, by the names of what they were in. Their gradients become fp32."""
    layer.rows, found = rows, {}
    for name, module in layer.named_children():
        if isinstance(module, Stacked):
            shape = module.weight.shape
            weight = torch.zeros(rows.here, *shape[1:], dtype=dtype, device=device)
            stack = Stack(shape, rows.homes, weight.requires_grad_(), weight)
            weight.register_post_accumulate_grad_hook(_adder(stack))
            del module._parameters["weight"]
            module.weight = weight  # type: ignore[assignment]
            found[name] = stack
    return found


def _adder(stack: Stack) -> Callable[[Tensor], None]:
    """What takes over the gradient of a batch."""

    def add(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        held = stack.gradient
        stack.gradient = gradient.float() if held is None else held.add_(gradient)

    return add


def _pieces(stack: Stack, world: World) -> list[Piece]:
    """Where the ranks hold each matrix, for a stack whose ranks have one, or a part of it."""
    size = stack.shape[1:].numel()
    parts = [stack.parts(rank)[rank] for rank in range(world.size)]
    found = []
    for expert in range(stack.shape[0]):
        begin = expert * size
        bounds = [0]
        for first, end in parts:
            here = max(min(end, begin + size) - max(first, begin), 0)
            bounds.append(bounds[-1] + here)
        found.append(Piece(stack.shape[1:], 0, bounds))
    return found
