"""Balance of experts: what keeps a router from giving all tokens to a few, in one layer.

`train.model.balance` adds up what the layers count.

Over the N tokens of an optimiser step that have a target, on all ranks and in all batches of the
step, with E experts of which each token chooses K:

    c_e = tokens that chose e       f_e = c_e / (N K), its share of the load
    p_te = s_te / Σ_j s_tj          P_e = (1/N) Σ_t p_te

    aux_loss       E Σ_e f_e P_e                1 where all is even (Switch, arXiv 2101.03961)
    z_loss         (1/N) Σ_t logsumexp(logits_t)²                 (ST-MoE, arXiv 2202.08906)
    sequence_loss  the first within each sequence, the mean over tokens of their sequences' losses
                   (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20)
    bias_update    no loss: after the step b_e += rate · sign(mean c − c_e)   (arXiv 2408.15664)
                   or, in proportion,       b_e += rate · (1 − c_e / mean c)

Each layer's loss is added to the step's, times its coefficient. No gradient reaches f_e, so that an
expert's factor on P_e is all that a backward pass needs of it. But f_e of a step is known only when
its last batch has been through the model, and the others' backward passes are over then. So the
gradient of `aux_loss` takes f_e of the step before, `Router.load`, which is 1/E in the first one:
it is the same for any number of ranks and batches of a step, and after a resume. The value that is
reported has the step's own f_e.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.settings import ConfigError, setting
from parallel import Shard
from parallel.travel.exchange import to_device

_PIECE = 256  # tokens


@dataclass
class Balancing:
    """Settings of what balances the experts."""

    bias: bool = setting(
        False, "a bias on the scores, for the choice only, which balances the experts"
    )
    bias_update: Literal["sign", "proportional", "none"] | None = setting(
        None, "after a step the bias rises where an expert had few tokens (null: sign with a bias)"
    )
    bias_rate: float = setting(
        1e-3, "by so much; proportional: times 1 − tokens / mean tokens", least=0, most=1
    )
    aux_loss: float = setting(
        0.0, "weight of E Σ f P in the loss: 0.01 in Switch, 0.001 in Qwen3", least=0, most=1e3
    )
    sequence_loss: float = setting(
        0.0, "the same within each sequence: 0.0001 in DeepSeek-V3", least=0, most=1e3
    )
    z_loss: float = setting(
        0.0, "weight of logsumexp² of the router's logits: 0.001 in ST-MoE", least=0, most=1e3
    )

    def __post_init__(self) -> None:
        if self.bias_update not in (None, "none") and not self.bias:
            raise ConfigError(
                f"bias_update is {self.bias_update}, but bias is false: set bias=true, or "
                "bias_update=null"
            )


class Counted:
    """The tokens of a batch that count: those with a target, and whose fragments they are in."""

    def __init__(self, labels: Tensor, shard: Shard) -> None:
        self.mask = labels >= 0  # (t,)
        self.shard = shard

    def sums(self, values: Tensor) -> Tensor:
        """values (t, n) -> (n,), over the tokens that count."""
        return self.mask.to(values.dtype) @ values

    def of_fragments(self, values: Tensor) -> Tensor:
        """values (t, n) -> (fragments, n), added up in an order that is always the same."""
        found = values * self.mask.unsqueeze(1)
        for bounds in self._bounds:
            found = torch.segment_reduce(found, "sum", offsets=bounds, unsafe=True)
        return found

    @cached_property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of pieces of fragments in tokens, and of fragments in pieces.

        One thread of a GPU adds up the rows of a segment, one after the other. So long fragments
        are cut into pieces that are added up at the same time: 128 K tokens into 512.
        """
        lengths = np.array(self.shard.lengths, dtype=np.int64)
        ends = lengths.cumsum()
        starts = [np.arange(end - n, end, _PIECE) for n, end in zip(lengths, ends, strict=True)]
        in_tokens = np.append(np.concatenate(starts), ends[-1])
        in_pieces = np.append(0, np.cumsum([len(each) for each in starts]))
        device = self.mask.device
        return to_device(in_tokens, device), to_device(in_pieces, device)

    def choices(self, experts: Tensor, count: int) -> Tensor:
        """experts (t, K) -> (count,) int64: tokens of each. Waits for no device."""
        chosen = self.mask.unsqueeze(1).expand_as(experts).flatten().long()
        return chosen.new_zeros(count).scatter_add_(0, experts.flatten(), chosen)

    def choices_of_fragments(self, experts: Tensor, count: int) -> Tensor:
        """experts (t, K) -> (fragments, count) int64."""
        shard = self.shard
        number = torch.repeat_interleave(shard.cu_seqlens.diff(), output_size=shard.tokens)
        found = self.choices(experts + count * number.unsqueeze(1), count * len(shard.lengths))
        return found.view(-1, count)


@dataclass
class Tally:
    """What a router has seen of a batch. Sums over the tokens that count, on this rank.

    Attributes:
        counts: (E,) int64, tokens of each expert.
        shares: (E,) Σ_t p_te, with its gradient; None without `aux_loss`.
        z: () Σ_t logsumexp², with its gradient; None without `z_loss`.
        within: the same shares of each fragment (fragments, E), with their gradient, and the
            experts that the scores alone would choose, (fragments, E) int64; None without
            `sequence_loss`.
        sequence: () the sum over tokens of their sequences' losses, once it is known.
    """

    counts: Tensor
    shares: Tensor | None
    z: Tensor | None
    within: tuple[Tensor, Tensor] | None = None
    sequence: Tensor | None = None

    @property
    def losses(self) -> list[Tensor]:
        """What has a gradient."""
        within = None if self.within is None else self.within[0]
        return [one for one in (self.shares, self.z, within) if one is not None]


def tally(
    batch: Counted, config: Balancing, logits: Tensor, p: Tensor, experts: Tensor, by: Tensor
) -> Tally:
    """Count a batch.

    Args:
        logits, p: (t, E); experts: (t, K), the chosen; by: (t, K), the best by score alone.
    """
    count = logits.shape[1]
    shares = z = within = None
    if config.aux_loss:
        shares = batch.sums(p)
    if config.sequence_loss:
        within = batch.of_fragments(p), batch.choices_of_fragments(by, count)
    if config.z_loss:
        z = batch.sums(logits.logsumexp(-1, keepdim=True).square()).squeeze(0)
    return Tally(batch.choices(experts, count), shares, z, within)
