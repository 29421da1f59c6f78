"""Mixers that no installable library has in plain torch, against their papers' equations.

Each definition is written a token and a head at a time from the weights, in fp64: outputs and
all gradients to 1e-9. `test_mixers_published.py` has the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import shard
from train.model import mixers
from train.model.config import ModelConfig

DIM, TOKENS, EPS = 16, 23, 1e-6
HEADS, KEY, VALUE = 2, 4, 3  # and twice as many value heads where a mixer has them
Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + EPS).sqrt() * weight


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum() + EPS).sqrt()


def turned(x: Tensor, position: int) -> Tensor:
    """Each pair of channels as a complex number times e^{i·position·θ}."""
    half = len(x) // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    pair = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pair.real, pair.imag])


def projected(w: Weights, x: Tensor, value_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v by token and head; a key head serves neighbouring value heads."""
    q, k, v = (x @ w["qkv.weight"].T).split([HEADS * KEY] * 2 + [value_heads * VALUE], dim=1)
    q, k = (part.reshape(TOKENS, HEADS, KEY) for part in (q, k))
    group = value_heads // HEADS
    of_head = [head // group for head in range(value_heads)]
    return q[:, of_head], k[:, of_head], v.reshape(TOKENS, value_heads, VALUE)


def convolved(w: Weights, x: Tensor) -> Tensor:
    """Projected, then each channel under its own filter, then SiLU."""
    qkv, taps = x @ w["qkv.weight"].T, w["conv"]
    rows = []
    for t in range(TOKENS):
        reach = [taps[:, -1 - j] * qkv[t - j] for j in range(taps.shape[1]) if t >= j]
        rows.append(F.silu(torch.stack(reach).sum(0)))
    return torch.stack(rows)


def recurrence(q: Tensor, k: Tensor, v: Tensor, a: Callable[[int, int], Any]) -> list[list[Tensor]]:
    """o_t = Dk^−½ S_tᵀ q_t, S_t = Diag(a_t) S_{t−1} + k_t v_tᵀ, by token and head."""
    out: list[list[Tensor]] = [[] for _ in range(TOKENS)]
    for h in range(v.shape[1]):
        S = torch.zeros(q.shape[2], v.shape[2], dtype=torch.float64)
        for t in range(TOKENS):
            factor = torch.as_tensor(a(t, h), dtype=torch.float64).reshape(-1, 1)
            S = factor * S + torch.outer(k[t, h], v[t, h])
            out[t].append(q[t, h] @ S * q.shape[2] ** -0.5)
    return out


def gated_norm(w: Weights, x: Tensor, o: list[list[Tensor]]) -> Tensor:
    """A norm a head, a swish gate, the output projection."""
    gate = x @ w["gate.weight"].T
    normed = [torch.cat([rms(head, w["norm.weight"]) for head in row]) for row in o]
    return (torch.stack(normed) * F.silu(gate)) @ w["out.weight"].T


def normed(w: Weights, o: list[list[Tensor]]) -> Tensor:
    """A norm over all heads together."""
    return torch.stack([rms(torch.cat(row), w["norm.weight"]) for row in o])


def gla(w: Weights, x: Tensor) -> Tensor:
    q, k, v = projected(w, x, 4)
    gate = x @ w["decay.down.weight"].T @ w["decay.up.weight"].T + w["decay.up.bias"]
    a = gate.sigmoid().reshape(TOKENS, 4, KEY) ** (1 / 16)
    return gated_norm(w, x, recurrence(q, k, v, lambda t, h: a[t, h]))


def retnet(w: Weights, x: Tensor) -> Tensor:
    q, k, v = projected(w, x, 4)
    q, k = (
        torch.stack([torch.stack([turned(head, t) for head in row]) for t, row in enumerate(part)])
        for part in (q, k)
    )
    return gated_norm(w, x, recurrence(q, k, v, lambda t, h: 1 - 2.0 ** (-5 - h)))


def deltanet(w: Weights, x: Tensor) -> Tensor:
    rows = convolved(w, x)
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    q, k, v = projected({"qkv.weight": eye}, rows, 4)
    beta = (x @ w["beta.weight"].T).sigmoid()
    out: list[list[Tensor]] = [[] for _ in range(TOKENS)]
    for h in range(4):
        S = torch.zeros(KEY, VALUE, dtype=torch.float64)
        for t in range(TOKENS):
            key = unit(k[t, h])
            S = S - beta[t, h] * torch.outer(key, key @ S - v[t, h])
            o = unit(q[t, h]) @ S * KEY**-0.5
            out[t].append(rms(o, w["norm.weight"]))
    return torch.stack([torch.cat(row) for row in out]) @ w["out.weight"].T


def forget(w: Weights, f: Tensor) -> Tensor:
    """γ + (1 − γ) σ(f)."""
    bound = w["forget.bound"].sigmoid()
    return bound + (1 - bound) * f.sigmoid()


def hgrn(w: Weights, x: Tensor) -> Tensor:
    i, f = (x @ w["input_forget.weight"].T).chunk(2, dim=1)
    a, h, rows = forget(w, f), torch.zeros(i.shape[1], dtype=torch.float64), []
    gate = F.silu(x @ w["gate.weight"].T)
    for t in range(TOKENS):
        h = a[t] * h + (1 - a[t]) * F.silu(i[t])
        rows.append(rms(h, w["norm.weight"]) * gate[t])
    return torch.stack(rows) @ w["out.weight"].T


def hgrn2(w: Weights, x: Tensor) -> Tensor:
    q, f, v = projected(w, x, 4)
    of_head = w["forget.bound"].reshape(HEADS, KEY).repeat_interleave(2, dim=0)
    a = forget({"forget.bound": of_head}, f)
    o = recurrence(F.silu(q), 1 - a, v, lambda t, h: a[t, h])
    return normed(w, o) @ w["out.weight"].T


def lightnet(w: Weights, x: Tensor) -> Tensor:
    """By its first form: a softmax over the tokens so far, a channel of k at a time."""
    q, k, v = projected(w, x, 4)
    rows = []
    for t in range(TOKENS):
        weights = k[: t + 1].softmax(dim=0)
        S = torch.einsum("shk,shv->hkv", weights, v[: t + 1])
        o = torch.einsum("hk,hkv->hv", F.silu(q[t]), S) * KEY**-0.5
        rows.append(rms(o.flatten(), w["norm.weight"]))
    gate = x @ w["gate.down.weight"].T @ w["gate.up.weight"].T
    return (torch.stack(rows) * F.silu(gate)) @ w["out.weight"].T


def linear_attention(w: Weights, x: Tensor) -> Tensor:
    q, k, v = projected(w, x, 4)
    o = recurrence(F.elu(q) + 1, F.elu(k) + 1, v, lambda t, h: 1.0)
    rows = [torch.cat([rms(head, w["norm.weight"]) for head in row]) for row in o]
    return torch.stack(rows) @ w["out.weight"].T


def averaged(weights: Tensor, v: Tensor) -> Tensor:
    """Σ_j w_ij v_j / Σ_j w_ij over j ≤ i for weights (T, T, H) and v (T, H, D)."""
    weights = weights * torch.ones(TOKENS, TOKENS).tril().unsqueeze(-1)
    return torch.einsum("ijh,jhd->ihd", weights / weights.sum(1, keepdim=True), v)


def linear_attention_sum(w: Weights, x: Tensor) -> Tensor:
    q, k, v = projected(w, x, 4)
    weights = torch.einsum("ihd,jhd->ijh", q.softmax(-1), k.softmax(-1))
    return averaged(weights, v).flatten(1) @ w["out.weight"].T


def hedgehog(w: Weights, x: Tensor) -> Tensor:
    """Two query heads on one of k and v, all of them normed and turned."""
    q, k, v = (x @ w["qkv.weight"].T).reshape(TOKENS, 4, KEY).split([2, 1, 1], dim=1)
    q, k = (
        torch.stack(
            [
                torch.stack([turned(rms(head, w[norm]), t) for head in row])
                for t, row in enumerate(y)
            ]
        )
        for y, norm in ((q, "q_norm.weight"), (k, "k_norm.weight"))
    )

    def features(y: Tensor, h: int, side: str) -> Tensor:
        mapped = y @ w[f"{side}_map"][h].T
        return torch.cat([2 * mapped, -2 * mapped], dim=1).softmax(dim=1)

    weights = [features(q[:, h], h, "q") @ features(k[:, 0], h, "k").T for h in range(2)]
    o = averaged(torch.stack(weights, dim=-1), v.expand(-1, 2, -1)).flatten(1)
    return (o * (x @ w["gate.weight"].T).sigmoid()) @ w["out.weight"].T


def transnormer_early(w: Weights, x: Tensor) -> Tensor:
    """Softmax attention inside blocks of 5."""
    q, k, v = (x @ w["qkv.weight"].T).reshape(TOKENS, 3, HEADS, KEY).unbind(1)
    scores = torch.einsum("ihd,jhd->ijh", q, k) * KEY**-0.5
    place = torch.arange(TOKENS)
    same = place[:, None] // 5 == place // 5
    o = averaged(scores.exp() * same.unsqueeze(-1), v)
    return o.flatten(1) @ w["out.weight"].T


def transnormer_late(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (x @ w["qkv.weight"].T).reshape(TOKENS, 3, HEADS, KEY).unbind(1)
    o = recurrence(F.elu(q) + 1, F.elu(k) + 1, v, lambda t, h: 1.0)
    return normed(w, o) @ w["out.weight"].T


GROUPED = {"heads": HEADS, "value_heads": 4, "head_dim": KEY, "value_head_dim": VALUE}
SHAPE = {"heads": HEADS, "head_dim": KEY}
# Definition, mixer, its layer of four, settings.
CASES: list[tuple[Callable[[Weights, Tensor], Tensor], str, int, dict[str, Any]]] = [
    (gla, "gla", 0, GROUPED | {"gate_rank": 3}),
    (retnet, "retnet", 0, GROUPED),
    (deltanet, "deltanet", 0, GROUPED | {"conv_size": 3}),
    (hgrn, "hgrn", 1, {"state_dim": 10}),
    (hgrn2, "hgrn2", 2, GROUPED),
    (lightnet, "lightnet", 0, GROUPED | {"gate_rank": 3}),
    (linear_attention, "linear_attention", 0, GROUPED),
    (
        linear_attention_sum,
        "linear_attention",
        0,
        GROUPED | {"feature_map": "softmax", "output_norm": "sum"},
    ),
    (hedgehog, "hedgehog", 0, SHAPE | {"kv_heads": 1}),
    (transnormer_early, "transnormer", 1, SHAPE | {"block": 5}),
    (transnormer_late, "transnormer", 2, SHAPE | {"block": 5}),
]


@pytest.mark.parametrize(
    ("define", "name", "layer", "settings"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_a_mixer_is_its_equation(
    define: Callable[[Weights, Tensor], Tensor], name: str, layer: int, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = ModelConfig(pattern=[name], layers=4, dim=DIM, mixers={name: settings})
    mixer = mixers.make(name, model, layer).double()
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    weights = dict(mixer.named_parameters())
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    got, wanted = mixer(x, shard([TOKENS], "cpu"))[0], define(weights, x[0])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(wanted)
    over = [x, *weights.values()]
    right = torch.autograd.grad(wanted, over, direction)
    for label, gradient, one in zip(
        ["x", *weights], torch.autograd.grad(got, over, direction), right, strict=True
    ):
        torch.testing.assert_close(gradient, one, rtol=1e-9, atol=1e-9, msg=label)


@pytest.mark.parametrize("layers", [1, 6])
def test_lower_bounds_of_forget_gates_begin_at_the_depth(layers: int) -> None:
    """As the papers' softmax over the depth begins: layer / layers."""
    for name in ("hgrn", "hgrn2"):
        config = ModelConfig(pattern=[name], layers=layers, dim=DIM)
        for layer in range(layers):
            gate = mixers.make(name, config, layer).forget
            width = DIM if name == "hgrn" else 4 * 64
            log_a, rest = gate(torch.full((1, width), -1e4))  # forget all that may be forgotten
            torch.testing.assert_close(log_a.exp(), torch.full((1, width), layer / layers))
            torch.testing.assert_close(rest, 1 - log_a.exp())
