"""Compare every op, on this machine's best backend, with its definition in fp64.

The error of an op is compared with the error of its definition run in the same dtype, bf16 or fp32,
by plain torch. More than `TOLERATED` times that is reported as BAD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

TOLERATED = 2.0  # times the plain error: a kernel that rounds in the right places is no worse

# (kind of decay, whether β is given) of each mixer.
MIXERS = {
    "linear": ("none", False),
    "retention": ("head", False),
    "mamba2": ("scalar", False),
    "gla": ("vector", False),
    "deltanet": ("none", True),
    "gated deltanet, a decay a head": ("head", True),
    "gated deltanet": ("scalar", True),
    "kda": ("vector", True),
}


class Case(NamedTuple):
    name: str
    op: Callable[..., Tensor]
    definition: Callable[..., Tensor]  # in the dtype of its arguments, gradients from autograd
    inputs: dict[str, Tensor]  # fp64
    keep_fp32: tuple[str, ...] = ()  # inputs that are fp32 whatever the dtype


def mixer_inputs(mixer: str, B: int, T: int, H: int, D: int) -> dict[str, Tensor]:
    """Random fp64 arguments of `kernels.linear_attention` for a mixer; shapes as there."""
    kind, delta = MIXERS[mixer]
    shape = {"none": None, "head": (H,), "scalar": (B, T, H), "vector": (B, T, H, D)}[kind]
    q, k, v = (torch.randn(B, T, H, D, dtype=torch.float64) for _ in range(3))
    inputs = {"q": q, "k": F.normalize(k, dim=-1), "v": v}
    if shape is not None:
        inputs["decay"] = F.logsigmoid(torch.randn(shape, dtype=torch.float64) + 2)
    if delta:
        inputs["beta"] = torch.randn(B, T, H, dtype=torch.float64).sigmoid()
    return inputs


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    """`kernels.linear_attention` token by token, with the state in the dtype of q."""
    B, T, H, Dk = q.shape
    S = q.new_zeros(B, H, Dk, v.shape[-1])
    outputs = []
    for t in range(T):
        if decay is not None:
            a = (decay if decay.dim() == 1 else decay[:, t]).exp().to(q.dtype)
            S = S * (a[..., None] if a.dim() == 3 else a[..., None, None])
        new = v[:, t]
        if beta is not None:
            seen = (k[:, t, :, None, :] @ S)[..., 0, :]
            new = beta[:, t, :, None].to(q.dtype) * (new - seen)
        S = S + k[:, t, :, :, None] * new[..., None, :]
        outputs.append((q[:, t, :, None, :] @ S)[..., 0, :] * Dk**-0.5)
    return torch.stack(outputs, dim=1)


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    y = F.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).mT


def _norm(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight * F.silu(gate)


def _rotary(x: Tensor) -> Tensor:
    T, half = x.shape[1], x.shape[3] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(T, dtype=torch.float64)[:, None, None] * frequency
    cos, sin = (f(angle).to(x) for f in (torch.cos, torch.sin))
    a, b = x.split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _scan(x: Tensor, decay: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    states = []
    for t in range(x.shape[1]):
        h = decay[:, t].exp().to(x.dtype) * h + x[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ v).transpose(1, 2)


def routing(tokens: int, chosen: int, experts: int) -> tuple[Tensor, Tensor]:
    """`rows` and `ends` of `kernels.expert_mlp` for tokens that choose experts at random."""
    choice = torch.rand(tokens, experts).topk(chosen, dim=1).indices.flatten()
    by_expert, order = choice.sort(stable=True)
    return order // chosen, torch.searchsorted(by_expert, torch.arange(experts), right=True)


def _experts(
    x: Tensor, weights: Tensor, up: Tensor, out: Tensor, rows: Tensor, ends: Tensor
) -> Tensor:
    """Row by row of all experts at once, summed in fp32 as the tokens of any model are."""
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        token = rows[start:end]
        gate, above = (x[token] @ up[expert].T).chunk(2, dim=-1)
        part = (F.silu(gate) * above) @ out[expert].T
        y = y.index_add(0, token, (part * weights[start:end, None]).to(y))
    return y.to(x.dtype)


def cases() -> Iterator[Case]:
    """Every op, at sizes for which its definition takes about a second."""
    B, T, H, D = 1, 200, 2, 64
    fp32 = ("decay", "beta")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def recurrence_op(**inputs: Any) -> Tensor:
        return kernels.linear_attention(**inputs)[0]

    for mixer in MIXERS:
        inputs = mixer_inputs(mixer, B, T, H, D)
        yield Case(f"linear_attention: {mixer}", recurrence_op, recurrence, inputs, fp32)

    decay = F.logsigmoid(random(2, T, D) + 2)
    yield Case(
        "diagonal_scan",
        lambda x, decay: kernels.diagonal_scan(x, decay)[0],
        _scan, {"x": random(2, T, D), "decay": decay}, fp32,
    )  # fmt: skip
    yield Case(
        "short_convolution",
        lambda x, weight: kernels.short_convolution(x, weight)[0],
        _convolution, {"x": random(2, T, D), "weight": random(D, 4) / 2},
    )  # fmt: skip
    yield Case(
        "rms_norm, gated",
        lambda x, weight, gate: kernels.rms_norm(x, weight, gate=gate),
        _norm, {"x": random(T, D), "weight": random(D), "gate": random(T, D)},
    )  # fmt: skip
    yield Case(
        "rotary_embedding",
        lambda x: kernels.rotary_embedding(x, torch.arange(T, device=x.device)),
        _rotary, {"x": random(B, T, H, D)},
    )  # fmt: skip
    labels = torch.randint(1000, (T,))
    yield Case(
        "linear_cross_entropy",
        lambda x, weight: kernels.linear_cross_entropy(x, weight, labels.to(x.device))[0],
        lambda x, weight: F.cross_entropy(x @ weight.T, labels.to(x.device), reduction="sum"),
        {"x": random(T, D), "weight": random(1000, D) / 8},
    )  # fmt: skip

    rows, ends = routing(T, 2, 8)
    yield Case(
        "expert_mlp",
        lambda x, weights, up, out: kernels.expert_mlp(
            x, rows.to(x.device), weights, ends.to(x.device), up, out
        ),
        lambda x, weights, up, out: _experts(x, weights, up, out, rows.to(x.device), ends),
        {
            "x": random(T, D), "weights": random(2 * T).sigmoid(),
            "up": random(8, 2 * D, D) / 8, "out": random(8, D, D) / 8,
        },
        ("weights",),
    )  # fmt: skip

    def attention_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = kernels.softmax_attention(q, k, v)
        assert isinstance(o, Tensor)
        return o

    yield Case(
        "softmax_attention", attention_op, _attention,
        {name: random(B, T, H, D) for name in "qkv"},
    )  # fmt: skip


class Error(NamedTuple):
    """Relative errors, in the Euclidean norm, of one output or gradient: ours and plain torch's."""

    case: str
    dtype: str
    what: str
    ours: float
    plain: float

    @property
    def bad(self) -> bool:
        # The plain computation may happen to be exact, so one rounding of the dtype is allowed.
        granted = torch.finfo(getattr(torch, self.dtype)).eps / 2
        return not self.ours <= TOLERATED * max(self.plain, granted)


def errors(case: Case, dtype: torch.dtype, device: str) -> Iterator[Error]:
    """Errors of the output and of each input's gradient, ours and the plain computation's."""
    rounded = {
        name: x.to(torch.float32 if name in case.keep_fp32 else dtype)
        for name, x in case.inputs.items()
    }

    def results(function: Callable[..., Tensor], to: dict[str, Any]) -> dict[str, Tensor]:
        given = {name: x.to(**to, copy=True).requires_grad_() for name, x in rounded.items()}
        y = function(**given)
        torch.manual_seed(0)
        cotangent = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        gradients = torch.autograd.grad(y, list(given.values()), cotangent.to(y))
        named = dict(zip((f"d{name}" for name in given), gradients, strict=True))
        return {name: x.detach().double().cpu() for name, x in {"output": y, **named}.items()}

    exact = results(case.definition, {"dtype": torch.float64})
    ours = results(case.op, {"device": device})
    plain = results(case.definition, {"device": device})
    for what, expected in exact.items():
        size = expected.norm().item() or 1.0
        ours_error, plain_error = ((x[what] - expected).norm().item() / size for x in (ours, plain))
        name = str(dtype).removeprefix("torch.")
        yield Error(case.name, name, what, ours_error, plain_error)


def main(as_json: bool) -> int:
    """Run the command; exit code 1 if an error is more than `TOLERATED` times the plain one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    if not as_json:
        print(f"{'op':48} {'dtype':9} {'worst of':9} {'ours':>9} {'plain':>9} {'ratio':>6}")
    for case in cases():
        for dtype in (torch.float32, torch.bfloat16):
            rows = list(errors(case, dtype, device))
            found += rows
            # One line for each case and dtype, with its worst output or gradient.
            worst = max(rows, key=lambda e: (e.bad, e.ours / max(e.plain, 1e-30)))
            ratio = worst.ours / max(worst.plain, 1e-30)
            if not as_json:
                print(
                    f"{worst.case:48} {worst.dtype:9} {worst.what:9} {worst.ours:9.1e} "
                    f"{worst.plain:9.1e} {ratio:6.2f}{'  BAD' if worst.bad else ''}",
                    flush=True,
                )
    bad = [e for e in found if e.bad]
    if as_json:
        import json

        print(json.dumps([e._asdict() | {"bad": e.bad} for e in found], indent=1))
    else:
        print(
            f"{len(found)} outputs and gradients on {device}, {len(bad)} more than twice as wrong"
        )
    return 1 if bad else 0
