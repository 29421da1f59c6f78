"""Parts that several mixers share: heads, projections, convolution, recurrence, gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import parallel
from data.settings import ConfigError, setting
from kernels import flops
from kernels.packing import accumulation_dtype
from parallel import Shard
from parallel.planning.clusters import Recurrent
from train.model import mixers
from train.model.config import MOST_HEAD_DIM, MOST_HEADS, MOST_TAPS, ModelConfig
from train.model.initial import Constant, Uniform, declared
from train.model.linear import InParts, Linear


@dataclass
class Heads:
    """Settings of every mixer whose state is one matrix a head."""

    heads: int = setting(4, "heads of q and k", least=1, most=MOST_HEADS)
    value_heads: int | None = setting(
        None, "heads of v, a multiple of heads (null: as many)", least=1, most=MOST_HEADS
    )
    head_dim: int = setting(64, "width of a head of q and k", least=1, most=MOST_HEAD_DIM)
    value_head_dim: int | None = setting(
        None, "width of a head of v (null: head_dim)", least=1, most=MOST_HEAD_DIM
    )
    conv_size: int = setting(
        0, "tokens under a short convolution over q, k and v; 0 for none", least=0, most=MOST_TAPS
    )

    def __post_init__(self) -> None:
        self.value_heads = self.heads if self.value_heads is None else self.value_heads
        self.value_head_dim = self.head_dim if self.value_head_dim is None else self.value_head_dim
        if self.value_heads % self.heads:
            raise ConfigError(
                f"value_heads is {self.value_heads}; it must be a multiple of heads, {self.heads}"
            )


@dataclass
class ConvolvedHeads(Heads):
    """`Heads` for mixers that are published with the short convolution."""

    conv_size: int = setting(
        4, "tokens under the short convolution; 0 for none", least=0, most=MOST_TAPS
    )


class LinearMixer(mixers.Mixer):
    """A mixer on `kernels.linear_attention`, with its projections to q, k, v and from o.

    A subclass adds the projections to decay, β and gates, and a `forward` that reads as its
    equation.

    Attributes:
        delta: whether the recurrence is the delta rule.
        kind: which of `parallel.planning.clusters.RECURRENCES` it is, for its price; unless given,
            the one of most work.
    """

    delta = False
    kind: str | None = None

    def __init__(self, model: ModelConfig, config: Heads, layer: int) -> None:
        super().__init__(model, config, layer)
        assert config.value_heads is not None
        assert config.value_head_dim is not None
        self.heads, self.value_heads = config.heads, config.value_heads
        self.head_dim, self.value_head_dim = config.head_dim, config.value_head_dim
        kind = self.kind or ("kda" if self.delta else "gla")
        self.recurrent: Recurrent | None = Recurrent(
            kind, self.value_heads, self.head_dim, self.value_head_dim
        )
        key_dim, self.value_dim = self.heads * self.head_dim, self.value_heads * self.value_head_dim
        self.widths = [key_dim, key_dim, self.value_dim]

        self.qkv = nn.Linear(model.dim, sum(self.widths), bias=False)
        self.conv = short_filters(sum(self.widths), config.conv_size)
        self.conv_bias: nn.Parameter | None = None
        self.out = nn.Linear(self.value_dim, model.dim, bias=False)

    def project(
        self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (1, t, dim) -> q, k (1, t, Hk, Dk) and v (1, t, Hv, Dv).

        After the short convolution and SiLU, if there is one.
        """
        qkv = convolved(self.qkv(x), self.conv, self.conv_bias, shard, cache)
        q, k, v = qkv.split(self.widths, dim=-1)
        return by_head(q, self.heads), by_head(k, self.heads), by_head(v, self.value_heads)

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        return flops.linear_attention(
            lengths, self.value_heads, self.head_dim, self.value_head_dim, self.delta
        )


def short_filters(channels: int, size: int) -> nn.Parameter | None:
    """Filters (channels, size) of a short convolution, which begin as `nn.Conv1d`'s; None for
    size 0."""
    return declared(Uniform(-(size**-0.5), size**-0.5), channels, size) if size else None


def convolved(
    x: Tensor,
    filters: Tensor | None,
    bias: Tensor | None,
    shard: Shard,
    cache: dict[str, Tensor] | None,
) -> Tensor:
    """x (1, t, channels) after the short convolution and SiLU; x itself if filters are None."""
    if filters is None:
        return x
    x, halo = parallel.short_convolution(
        x,
        filters,
        shard,
        bias=bias,
        initial_state=None if cache is None else cache.get("conv"),
        output_final_state=cache is not None,
    )
    if cache is not None and halo is not None:
        cache["conv"] = halo
    return x


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    shard: Shard,
    cache: dict[str, Tensor] | None,
    scale: float | None = None,
    meanwhile: Later | None = None,
) -> Tensor:
    """o (1, t, Hv, Dv) of `kernels.linear_attention`; from and to the state in a cache, if any."""
    o, state = parallel.linear_attention(
        q,
        k,
        v,
        decay,
        beta,
        shard,
        scale=scale,
        initial_state=None if cache is None else cache.get("state"),
        output_final_state=cache is not None,
        meanwhile=meanwhile,
    )
    if cache is not None and state is not None:
        cache["state"] = state
    return o


class Later:
    """A projection of x that is computed in pieces while states travel: a `meanwhile` for
    `parallel.linear_attention`, whose `value` is there afterwards."""

    def __init__(self, linear: Linear, x: Tensor) -> None:
        self._linear, self._x = linear, x
        self._pieces: list[Tensor] = []

    def __call__(self, piece: int, pieces: int) -> None:
        if piece == 0:
            self._passage = InParts(self._linear, pieces)
        width = self._linear.out_features
        run = width * piece // pieces, width * (piece + 1) // pieces
        self._pieces += self._passage.rows(self._x, [run])

    @property
    def value(self) -> Tensor:
        """The projection (…, out), once all pieces were computed."""
        return self._pieces[0] if len(self._pieces) == 1 else torch.cat(self._pieces, dim=-1)


def average(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, cache: dict[str, Tensor] | None
) -> Tensor:
    """o_i = Σ_j ⟨q_i, k_j⟩ v_j / Σ_j ⟨q_i, k_j⟩ over j ≤ i, for q and k that are never negative.

    The denominator is the output of one more channel of v, all ones.
    """
    # v (1, t, H, Dv) -> (1, t, H, Dv + 1)
    o = recur(q, k, F.pad(v, (0, 1), value=1.0), None, None, shard, cache, scale=1.0)
    # All features may be 0; the gradient must not overflow then.
    return o[..., :-1] / o[..., -1:].clamp_min(1e-12)


class LowRank(nn.Module):
    """A projection through `rank` channels: (…, dim) -> (…, rank) -> (…, out)."""

    def __init__(self, dim: int, rank: int, out: int, bias: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class BoundedForgetGate(nn.Module):
    """a = γ + (1 − γ) σ(f): HGRN's forget gate, with a lower bound γ that grows with the depth.

    In the papers the bounds of all layers come from one cumulative softmax over the depth. Here
    each layer learns its own γ, starting at layer / layers as that softmax does, so that a layer
    depends on no other. The first layer has no bound, as in the papers.
    """

    def __init__(self, dim: int, layer: int, layers: int) -> None:
        super().__init__()
        # γ = σ(bound)
        start = math.log(layer / (layers - layer)) if layer else 0.0
        self.bound = declared(Constant(start), dim) if layer else None

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """f (…, dim) -> log a and 1 − a, (…, dim) each, both exact near 0."""
        f = full(f)
        if self.bound is None:
            return F.logsigmoid(f), torch.sigmoid(-f)
        bound = full(self.bound)
        log_a = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + F.logsigmoid(f))
        return log_a, torch.sigmoid(-bound) * torch.sigmoid(-f)


def by_head(x: Tensor, heads: int) -> Tensor:
    """(…, heads · D) -> (…, heads, D)."""
    return x.unflatten(-1, (heads, -1))


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """(…, heads, D) -> (…, heads · times, D), a head's copies adjacent; a view for times 1."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], times, x.shape[-1]).flatten(-3, -2)


def full(x: Tensor) -> Tensor:
    """x in fp32 (fp64 stays): for what goes into an exponent."""
    return x.to(accumulation_dtype(x.dtype))


def unit_length(x: Tensor) -> Tensor:
    """x (…, D) with every row scaled to length 1."""
    return x * torch.rsqrt(full(x).square().sum(-1, keepdim=True) + 1e-6).to(x.dtype)


def decay_parameters(
    rates: int, steps: int, slowest: float = 1.0
) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log (rates,) and dt_bias (steps,) of decay = −exp(A_log) · softplus(… + dt_bias).

    They begin in Mamba's ranges: rates uniform from `slowest` to 16, time steps log-uniform in
    [0.001, 0.1].
    """
    A_log = declared(Uniform(slowest, 16, then=torch.log), rates)
    dt_bias = declared(Uniform(math.log(1e-3), math.log(0.1), then=_softplus_is_exp), steps)
    return A_log, dt_bias


def _softplus_is_exp(x: Tensor) -> Tensor:
    """y with softplus(y) = exp(x)."""
    dt = x.exp()
    return dt + torch.log(-torch.expm1(-dt))
