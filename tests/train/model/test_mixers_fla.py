"""Mixers against the layers of flash-linear-attention, where it is installed.

Its layers call Triton kernels. Here they call its own plain torch references instead (`naive`),
and plain norms, convolutions and rotary embedding. fp32: outputs, and gradients of the input
and of every weight of theirs, to 1e-5 of the largest number of each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from parallel import shard
from train.model import mixers
from train.model.config import ModelConfig

pytest.importorskip("fla", reason="flash-linear-attention is not installed")

DIM, HEADS, TOKENS, EPS = 32, 4, 37, 1e-5
Weights = dict[str, Tensor]


def root(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    """Their RMSNorm, and FusedRMSNormGated when it is given a gate."""

    def __init__(self, hidden_size: int, eps: float = EPS, **_: Any) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(hidden_size)), None
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = root(x, self.eps) * self.weight
        return y if gate is None else y * F.silu(gate)


class Convolution(nn.Module):
    def __init__(self, hidden_size: int, kernel_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, 1, kernel_size))

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        before = F.pad(x.transpose(1, 2), (self.weight.shape[2] - 1, 0))
        return F.silu(F.conv1d(before, self.weight, groups=x.shape[2])).transpose(1, 2), None


class Rotary(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rates = 10000.0 ** -(torch.arange(0, dim, 2) / dim)

    def forward(self, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(q.shape[1]), self.rates).unsqueeze(1)
        return turn(q, angle), turn(k, angle)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def naive(op: str) -> Any:
    return importlib.import_module(f"fla.ops.{op}.naive")


def gla(q: Tensor, k: Tensor, v: Tensor, g: Any = None, gk: Any = None, **_: Any) -> Any:
    decay = gk if g is None else g
    decay = torch.zeros_like(k) if decay is None else decay  # plain linear attention
    return naive("gla").naive_recurrent_gla(q, k, v, decay)


def retention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    return naive("retention").naive_retention(*by_head).transpose(1, 2), None


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    by_head = (x.transpose(1, 2) for x in (q, k, v, beta))
    return naive("delta_rule").delta_rule_recurrence(*by_head)[0].transpose(1, 2), None


def hgrn(x: Tensor, g: Tensor, **_: Any) -> Any:
    return naive("hgrn").naive_recurrent_hgrn(x, g)


def lightnet(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Any]:
    z = k.logcumsumexp(1)
    decay = F.pad(z[:, :-1] - z[:, 1:], (0, 0, 0, 0, 1, 0))
    return gla(q, (k - z).exp(), v, decay)[0], (None, None)


def norm_gate_linear(o: Tensor, gate: Tensor, w: Tensor, _: Any, out: Tensor, *__: Any) -> Tensor:
    return F.linear(root(o, EPS) * w * F.silu(gate), out)


def norm_linear(o: Tensor, w: Tensor, _: Any, out: Tensor, *__: Any) -> Tensor:
    return F.linear(root(o, EPS) * w, out)


# What stands in for what, by the end of a name in a module of layers.
STAND_INS = {
    "FusedRMSNormGated": Norm,
    "RMSNorm": Norm,
    "ShortConvolution": Convolution,
    "RotaryEmbedding": Rotary,
    "_gla": gla,
    "_linear_attn": gla,
    "_retention": retention,
    "_delta_rule": delta_rule,
    "_hgrn": hgrn,
    "_lightnet": lightnet,
    "rms_norm_swish_gate_linear": norm_gate_linear,
    "rms_norm_linear": norm_linear,
    "swiglu": lambda a, b: F.silu(a) * b,
    "swish": F.silu,
}


def layer(monkeypatch: pytest.MonkeyPatch, module: str, name: str, **settings: Any) -> nn.Module:
    """One of their layers on stand-ins, with weights that all have their say."""
    home = importlib.import_module(f"fla.layers.{module}")
    for known in list(vars(home)):
        for end, stand_in in STAND_INS.items():
            if known == end or (end.startswith("_") and known.endswith(end)):
                monkeypatch.setattr(home, known, stand_in)
    made = getattr(home, name)(hidden_size=DIM, **settings)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in key else 0.3 * noise
    return made


def joined(w: Weights, *names: str) -> Tensor:
    return torch.cat([w[f"{name}.weight"] for name in names])


def qkv(w: Weights) -> Weights:
    return {
        "qkv.weight": joined(w, "q_proj", "k_proj", "v_proj"),
        "out.weight": w["o_proj.weight"],
    }


SHAPE = {"heads": HEADS, "head_dim": 8}
BOUND = torch.full((DIM,), 0.5)
# Mixer, their module, class and settings; ours; our weights of theirs.
CASES: list[tuple[str, str, str, dict, dict, Callable[[Weights], Weights]]] = [
    (
        "gla",
        "gla",
        "GatedLinearAttention",
        {"expand_k": 0.5, "num_heads": HEADS, "gate_low_rank_dim": 5},
        {"heads": HEADS, "head_dim": 4, "value_head_dim": 8, "gate_rank": 5},
        lambda w: (
            qkv(w)
            | {
                "decay.down.weight": w["gk_proj.0.weight"],
                "decay.up.weight": w["gk_proj.1.weight"],
                "decay.up.bias": w["gk_proj.1.bias"],
                "gate.weight": w["g_proj.weight"],
                "norm.weight": w["g_norm_swish_gate.weight"],
            }
        ),
    ),
    (
        "deltanet",
        "delta_net",
        "DeltaNet",
        {"num_heads": HEADS},
        SHAPE,
        lambda w: (
            qkv(w)
            | {
                "conv": joined(w, "q_conv1d", "k_conv1d", "v_conv1d").squeeze(1),
                "beta.weight": w["b_proj.weight"],
                "norm.weight": w["o_norm.weight"],
            }
        ),
    ),
    (
        "retnet",
        "multiscale_retention",
        "MultiScaleRetention",
        {"num_heads": HEADS},
        SHAPE | {"value_head_dim": 16},
        lambda w: (
            qkv(w)
            | {"gate.weight": w["g_proj.weight"], "norm.weight": w["g_norm_swish_gate.weight"]}
        ),
    ),
    (
        "hgrn",
        "hgrn",
        "HGRNAttention",
        {"layer_idx": 2},
        {},
        lambda w: {
            "input_forget.weight": joined(w, "i_proj", "f_proj"),
            "gate.weight": w["g_proj.weight"],
            "forget.bound": torch.zeros(DIM),  # σ(0) is their bound, a half
            "norm.weight": w["g_norm.weight"],
            "out.weight": w["o_proj.weight"],
        },
    ),
    (
        "hgrn2",
        "hgrn2",
        "HGRN2Attention",
        {"expand_ratio": 8, "layer_idx": 2},
        SHAPE,
        lambda w: {
            "qkv.weight": joined(w, "q_proj", "f_proj", "i_proj"),
            "forget.bound": torch.zeros(DIM),
            "norm.weight": w["g_norm.weight"],
            "out.weight": w["o_proj.weight"],
        },
    ),
    (
        "lightnet",
        "lightnet",
        "LightNetAttention",
        {"expand_ratio": 8, "gate_low_rank_dim": 5},
        SHAPE | {"gate_rank": 5},
        lambda w: (
            qkv(w)
            | {
                "gate.down.weight": w["g_proj.0.weight"],
                "gate.up.weight": w["g_proj.1.weight"],
                "norm.weight": w["g_norm.weight"],
            }
        ),
    ),
    (
        "linear_attention",
        "linear_attn",
        "LinearAttention",
        {"num_heads": HEADS, "feature_map": "elu"},
        SHAPE,
        lambda w: qkv(w) | {"norm.weight": w["norm.weight"]},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_mixer_is_their_layer(monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    name, module, kind, their_settings, settings, ours = case
    theirs = layer(monkeypatch, module, kind, **their_settings)
    weights = dict(theirs.named_parameters())
    model = ModelConfig(pattern=[name], layers=4, dim=DIM, norm_eps=EPS, mixers={name: settings})
    mixer = mixers.make(name, model, 2)
    more = {"lower_bound": BOUND} if name.startswith("hgrn") else {}
    x = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(3)).requires_grad_()
    wanted = theirs(x, **more)[0]
    got = functional_call(mixer, ours(weights), (x, shard([TOKENS], "cpu")), strict=True)
    close("output", got, wanted)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4))
    over = [x, *weights.values()]
    right = torch.autograd.grad(wanted, over, direction)
    for label, gradient, one in zip(
        ["x", *weights], torch.autograd.grad(got, over, direction), right, strict=True
    ):
        close(label, gradient, one)


def close(name: str, got: Tensor, wanted: Tensor) -> None:
    scale = float(wanted.detach().abs().max())
    assert scale > 0, name
    assert float((got - wanted).detach().abs().max()) < 1e-5 * scale, name
