"""The balance of experts by its definition: loops over tokens, sequences and experts, on one rank.

It takes from a model what goes into its routers, and what they choose, and nothing else.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.model.mlps._router import Router

OFF = {"aux_loss": 0.0, "z_loss": 0.0, "sequence_loss": 0.0}


class Layer:
    """One router over an optimiser step. `on` are its settings, which the model itself lacks."""

    def __init__(self, router: Router, on: dict[str, Any]) -> None:
        self.router, self.on = router, OFF | {"bias_update": "none", "bias_rate": 1e-3} | on
        self.load = router.load.double().clone()
        self.counts = np.zeros(router.config.experts)
        self.sums = dict.fromkeys(OFF, 0.0)  # over the step's tokens
        self.shares = torch.zeros(router.config.experts, dtype=torch.float64)
        router.register_forward_hook(self._saw)

    def _saw(self, _: nn.Module, given: tuple[Tensor], chosen: tuple[Tensor, Tensor]) -> None:
        self.x, self.experts = given[0], chosen[0]

    def losses(self, labels: np.ndarray, cu_seqlens: np.ndarray) -> Tensor:
        """The batch's, weighted: sums over its tokens with a target."""
        count, k = self.router.config.experts, self.router.config.chosen
        logits = self.x.double() @ self.router.weight.double().T
        makes = {"softmax": lambda x: x.exp(), "sigmoid": torch.sigmoid}
        scores = makes[self.router.config.router](logits)
        p = scores / scores.sum(1, keepdim=True)
        total = logits.new_zeros(())
        for start, end in pairwise(cu_seqlens.tolist()):
            counted = [t for t in range(start, end) if labels[t] >= 0]
            if not counted:
                continue
            alone = np.zeros(count)
            for t in counted:
                for e in self.experts[t].tolist():
                    self.counts[e] += 1
                for e in scores[t].topk(k).indices.tolist():
                    alone[e] += 1
                z = logits[t].exp().sum().log() ** 2
                aux = sum(count * self.load[e] * p[t, e] for e in range(count))
                self.sums["z_loss"] += float(z.detach())
                self.shares += p[t].detach()
                total = total + self.on["z_loss"] * z + self.on["aux_loss"] * aux
            mean = p[counted].mean(0)
            f = alone * count / (k * len(counted))
            within = len(counted) * sum(f[e] * mean[e] for e in range(count))
            self.sums["sequence_loss"] += float(within.detach())
            total = total + self.on["sequence_loss"] * within
        return total

    def end(self) -> dict[str, float]:
        """Update bias and load; the step's losses without their weights."""
        config, tokens = self.router.config, self.counts.sum() / self.router.config.chosen
        mean = self.counts.sum() / config.experts
        told = {name: value / max(tokens, 1) for name, value in self.sums.items()}
        if tokens:
            share = self.counts / self.counts.sum()
            told["aux_loss"] = config.experts * float(share @ self.shares.numpy()) / tokens
            for e in range(config.experts):
                lack = {
                    "none": 0.0,
                    "sign": np.sign(mean - self.counts[e]),
                    "proportional": 1 - self.counts[e] / mean,
                }[self.on["bias_update"]]
                if lack:
                    self.router.choice_bias[e] += self.on["bias_rate"] * lack
                self.load[e] = share[e]
            self.router.load.copy_(self.load)
        self.counts[:], self.shares = 0, torch.zeros_like(self.shares)
        self.sums = dict.fromkeys(OFF, 0.0)
        return told
