"""Which experts a token goes to, and with what weights: every router of published models.

    s = score(logits), in fp32                       softmax, sigmoid or √softplus
    the `chosen` best by s + bias, of the best groups if there are groups
    w = s of those, divided by their sum if `normalise`, times `scaling`
    or w = softmax over the logits of those alone, if `of_chosen`

A group's own score is the sum of its two best s + bias. The better of two equal scores is the one
of the lower index, on any device: a token's experts depend on nothing but its row of logits.

Sources: softmax and top-k, Shazeer et al. 2017 (arXiv 1701.06538); sigmoid, bias and groups,
DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.settings import ConfigError, setting
from kernels.packing import accumulation_dtype
from train.model.initial import Constant
from train.model.mlps._balance import Balancing, Counted, Tally, tally

MOST_EXPERTS = 4096


@dataclass
class Routing(Balancing):
    """Settings of a router."""

    experts: int = setting(8, "number of experts", least=1, most=MOST_EXPERTS)
    chosen: int = setting(2, "experts of a token", least=1, most=MOST_EXPERTS)
    router: Literal["softmax", "sigmoid", "sqrtsoftplus"] = setting(
        "softmax", "what makes scores of the router's logits, in fp32"
    )
    of_chosen: bool = setting(
        False, "weights are the softmax over the chosen experts' logits, as in Granite"
    )
    normalise: bool = setting(True, "divide the weights of the chosen by their sum")
    normalise_eps: float = setting(1e-20, "added to that sum", least=0, most=1)
    scaling: float = setting(1.0, "factor on the weights", above=0, most=1e6)
    groups: int = setting(1, "groups of experts, a divisor of experts", least=1, most=MOST_EXPERTS)
    chosen_groups: int = setting(
        1, "groups that a token's experts are from", least=1, most=MOST_EXPERTS
    )
    other_groups: Literal["excluded", "zero"] = setting(
        "excluded", "scores of all other groups count as −∞, or as 0 as in AXK2"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen > self.experts:
            raise ConfigError(
                f"chosen is {self.chosen}; it must be at most experts, {self.experts}"
            )
        if self.experts % self.groups:
            raise ConfigError(
                f"groups is {self.groups}; it must be a divisor of experts, {self.experts}"
            )
        if self.chosen_groups > self.groups:
            raise ConfigError(
                f"chosen_groups is {self.chosen_groups}; it must be at most groups, {self.groups}"
            )
        each = self.experts // self.groups
        if self.groups > 1 and each < 2:
            raise ConfigError(f"groups is {self.groups}; each group must have 2 experts or more")
        if self.chosen > self.chosen_groups * each:
            raise ConfigError(
                f"chosen is {self.chosen}; {self.chosen_groups} groups of {each} experts have only "
                f"{self.chosen_groups * each}"
            )
        if self.of_chosen and self.router != "softmax":
            raise ConfigError(f"of_chosen is true; router must be softmax, and is {self.router}")


class Router(nn.Linear):
    """Logits and choice. The products are fp32, whatever the dtype of the model.

    The bias on the choice is no parameter: no gradient reaches it, and no optimiser. It and `load`,
    the experts' shares of the last step's choices, stay fp32 and are updated by
    `train.model.balance`. `load` is of the training, not of the model: it is no persistent buffer.

    Attributes:
        batch: which tokens the next forward pass counts, for the balance; None for none.
        tally: what it has counted.
    """

    choice_bias: Tensor | None
    load: Tensor

    def __init__(self, dim: int, config: Routing) -> None:
        super().__init__(dim, config.experts, bias=False)
        self.config = config
        self.register_buffer("choice_bias", torch.zeros(config.experts) if config.bias else None)
        even = 1 / config.experts
        self.register_buffer("load", torch.full((config.experts,), even), persistent=False)
        self.load.first = Constant(even)  # type: ignore[attr-defined]
        self.batch: Counted | None = None
        self.tally: Tally | None = None

    def forward(self, x: Tensor) -> Any:
        """x (t, dim) -> experts (t, chosen) int64, best first, and their weights (t, chosen) fp32
        (fp64 for fp64)."""
        full = accumulation_dtype(x.dtype)
        logits = F.linear(x.to(full), self.weight.to(full))
        scores = _scores(logits, self.config.router)
        ranked = scores.detach()
        if self.choice_bias is not None:
            ranked = ranked + self.choice_bias
        if self.config.groups > 1:
            ranked = _within_groups(ranked, self.config)
        experts = best(ranked, self.config.chosen)
        if self.config.of_chosen:
            weights = logits.gather(1, experts).softmax(-1)
        else:
            weights = scores.gather(1, experts)
            if self.config.normalise:
                weights = weights / (weights.sum(-1, keepdim=True) + self.config.normalise_eps)
        if self.batch is not None:
            seen = self._counted(self.batch, logits, scores, experts)
            # Activation checkpointing runs this again, and what it makes then would hold the
            # activations that it makes.
            self.tally = self.tally or seen
        return experts, weights * self.config.scaling

    def _counted(self, batch: Counted, logits: Tensor, scores: Tensor, experts: Tensor) -> Tally:
        by_score = experts
        if self.config.sequence_loss and (self.config.bias or self.config.groups > 1):
            by_score = best(scores.detach(), self.config.chosen)
        of_all = scores
        if self.config.router != "softmax" and (self.config.aux_loss or self.config.sequence_loss):
            of_all = scores / scores.sum(-1, keepdim=True)
        return tally(batch, self.config, logits, of_all, experts, by_score)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            moved = self._buffers[name]
            if old is not None and moved is not None and moved.dtype != old.dtype:
                self._buffers[name] = old.to(moved.device)
        return self


def _scores(logits: Tensor, router: str) -> Tensor:
    if router == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if router == "sigmoid" else F.softplus(logits).sqrt()


def _within_groups(ranked: Tensor, config: Routing) -> Tensor:
    """Scores (t, experts), those outside of each token's best groups taken out."""
    grouped = ranked.unflatten(1, (config.groups, -1))  # (t, groups, experts of each)
    of_groups = grouped.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(of_groups, dtype=torch.bool)
    kept.scatter_(1, best(of_groups, config.chosen_groups), True)
    lost = float("-inf") if config.other_groups == "excluded" else 0.0
    return grouped.masked_fill(~kept.unsqueeze(-1), lost).flatten(1)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices (t, count) of the highest scores of each row (t, n), of equal ones the first.

    In fp32 score and index are one integer, of which no two are equal: `topk` of these takes a
    third of the time of a stable sort at 512 experts.
    """
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    bits = (scores + 0.0).view(torch.int32)  # −0 becomes 0
    # As integers, negative numbers are in the wrong order: turned, all but their sign.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    n = scores.shape[1]
    later = torch.arange(n - 1, -1, -1, device=scores.device)
    return (ordered * n + later).topk(count).indices
