"""The balance of a model's experts over an optimiser step: counts, losses, updates.

`train.model.mlps._balance` has the equations, and counts a batch in one layer. Here a step's counts
are added up over batches and, in one all-reduce for all layers, over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel import Shard, World, sum_of_sequences
from train.model.mlps._balance import Counted, Tally
from train.model.mlps._router import Router


@dataclass(frozen=True)
class Load:
    """How even the experts of a layer were in a step.

    Attributes:
        counts: tokens with a target that chose each expert.
        losses: of those losses that are on, the value without its coefficient, by setting.
        bias_range: highest minus lowest bias that the step's choices had; None without a bias.
    """

    counts: list[int]
    losses: dict[str, float]
    bias_range: float | None


class Balance:
    """Of all layers of experts of `model`, which may be none.

    A step is `begin`, the forward pass, `loss`, the backward pass and `add` for each batch, then
    `reduce` and `end`. What goes from one step to the next is in buffers of the routers, which
    checkpoints save.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = {
            name: module for name, module in model.named_modules() if isinstance(module, Router)
        }
        self._sums: Tensor | None = None  # of the step, a `_row` for each layer
        self._host: Tensor | None = None  # the same and the bias's range, for `loads`

    def begin(self, labels: Tensor | None, shard: Shard) -> None:
        """Say what the next forward pass counts.

        Args:
            labels: (t,), negative where a token has no target; None to count nothing.
        """
        batch = Counted(labels, shard) if self._routers and labels is not None else None
        for router in self._routers.values():
            router.batch, router.tally = batch, None

    def loss(self, shard: Shard) -> Tensor | float:
        """The weighted losses of the forward pass, of all layers, with their gradient.

        They are sums over this rank's tokens with a target: like that of the cross-entropy, their
        sum over ranks and batches is divided by the targets of the step.
        """
        total: Tensor | float = 0.0
        factors = self._of_sequences(shard)
        for name, router in self._routers.items():
            seen, config = router.tally, router.config
            if seen is None:
                continue
            if seen.shares is not None:
                even = config.experts * router.load.to(seen.shares.dtype)
                total = total + config.aux_loss * (seen.shares @ even)
            if seen.z is not None:
                total = total + config.z_loss * seen.z
            sequence = None
            if seen.within is not None:
                sequence = (seen.within[0] * factors[name]).sum()
                total = total + config.sequence_loss * sequence
            # Without gradients, which would keep the graph.
            router.tally = Tally(
                seen.counts,
                None if seen.shares is None else seen.shares.detach(),
                None if seen.z is None else seen.z.detach(),
                sequence=None if sequence is None else sequence.detach(),
            )
        return total

    def add(self) -> None:
        """Add the batch that went forward to the step."""
        rows = [_row(router.tally) for router in self._routers.values() if router.tally is not None]
        if rows:
            row = torch.cat(rows)
            self._sums = row if self._sums is None else self._sums + row

    def reduce(self, world: World) -> None:
        """Add up the step over all ranks, and begin to copy it to the host.

        `loads` is right as soon as the host has waited for the device, as every step does once to
        learn its loss and gradient norm. Counts are whole numbers, exact in fp64 up to 2^53.
        """
        if self._sums is not None:
            world.sum(self._sums)
            ranges = [
                router.choice_bias.max() - router.choice_bias.min()
                for router in self._routers.values()
                if router.choice_bias is not None
            ]
            told = torch.cat([self._sums, *(r.double().view(1) for r in ranges)])
            self._host = told.to("cpu", non_blocking=True)

    @torch.no_grad()
    def end(self, good: bool) -> None:
        """End a step: update biases and `Router.load`, unless the step was bad."""
        sums, self._sums = self._sums, None
        if sums is None or not good:
            return
        for _, router, (counts, *_) in self._layers(sums):
            config = router.config
            if router.choice_bias is not None and config.bias_update != "none":
                mean = counts.mean()
                if config.bias_update == "proportional":
                    lack = (mean - counts) / mean.clamp(min=1 / config.experts)
                else:
                    lack = (mean - counts).sign()
                router.choice_bias.add_(lack.float(), alpha=config.bias_rate)
            total = counts.sum()
            share = (counts / total.clamp(min=1)).float()
            router.load.copy_(torch.where(total > 0, share, router.load))

    def loads(self) -> dict[int, Load]:
        """How even the last step was, by block; of all ranks, on each rank."""
        if self._host is None:
            return {}
        ranges = iter(self._host[sum(2 * r.config.experts + 2 for r in self._routers.values()) :])
        found = {}
        for name, router, (counts, shares, z, sequence) in self._layers(self._host):
            config, total = router.config, max(1.0, float(counts.sum()))
            tokens = total / config.chosen
            values = {
                "aux_loss": config.experts * float(counts @ shares) / total / tokens,
                "z_loss": float(z) / tokens,
                "sequence_loss": float(sequence) / tokens,
            }
            found[int(name.split(".")[1])] = Load(
                [int(count) for count in counts.tolist()],
                {name: value for name, value in values.items() if getattr(config, name)},
                None if router.choice_bias is None else float(next(ranges)),
            )
        return found

    def _of_sequences(self, shard: Shard) -> dict[str, Tensor]:
        """(fragments, E) for each layer with a `sequence_loss`: E c_e / Σ c of each sequence."""
        counts = {
            name: router.tally.within[1]
            for name, router in self._routers.items()
            if router.tally is not None and router.tally.within is not None
        }
        if not counts:
            return {}
        sums = sum_of_sequences(torch.cat(list(counts.values()), dim=1), shard)
        each = sums.split([one.shape[1] for one in counts.values()], dim=1)
        return {
            name: one.shape[1] * one / one.sum(1, keepdim=True).clamp(min=1)
            for name, one in zip(counts, each, strict=True)
        }

    def _layers(self, sums: Tensor) -> Iterator[tuple[str, Router, tuple[Tensor, ...]]]:
        """Each router by its name, with its counts (E,), shares (E,), z () and sequence loss ()."""
        begin = 0
        for name, router in self._routers.items():
            count = router.config.experts
            own = sums[begin : begin + 2 * count + 2]
            begin += len(own)
            yield name, router, (own[:count], own[count:-2], own[-2], own[-1])


def _row(seen: Tally) -> Tensor:
    """(2 E + 2,) fp64: counts, shares, z and the loss within sequences; 0 for what is not on."""
    counts = seen.counts.double()
    zero = counts.new_zeros(1)
    return torch.cat(
        [
            counts,
            torch.zeros_like(counts) if seen.shares is None else seen.shares.double(),
            *(zero if one is None else one.double().view(1) for one in (seen.z, seen.sequence)),
        ]
    )
